"""One launch of a Triton kernel: run it, or compile it ahead of time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

_MOST_BLOCKS = 65535  # in a grid's second and third direction


@dataclass(frozen=True)
class Shipped:
    """A configuration of a kernel that is in use; every Triton module lists its own in ``shipped()``.

    Attributes:
        name: tells it from the others in the table that ``p2pfast.ops.gpu.compile`` prints.
        kernel: the ``@triton.jit`` function.
        signature: the type of each argument that is no constant: ``"*bf16"``, ``"*fp32"``, ``"i32"``,
            ``"i64"``, ``"fp32"``.
        constexprs: the values of the constants (and of arguments that are None, or the integer 1).
        num_warps, num_stages: as at its launch.
        matmul: tensor-core instructions are expected.
        aligned: arguments known to be divisible by 16; None: every pointer and every i32.
        descriptor: weights are described for the hardware that copies them, which sm_90 and later have.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    matmul: bool = False
    aligned: tuple[str, ...] | None = None
    descriptor: bool = False


@dataclass
class Launch:
    """What one call of a kernel is given.

    Attributes:
        arguments: tensors, integers, floats; None for a tensor that is not there.
        constants: the kernel's ``tl.constexpr`` parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is called with."""
        return {
            **self.arguments,
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def run(self) -> None:
        """Launches on the current device and stream. Raises ValueError for a grid that CUDA refuses."""
        if max(self.grid[1:], default=1) > _MOST_BLOCKS or self.grid[0] >= 2**31:
            raise ValueError(
                f"{self.kernel.__name__} would need a grid of {self.grid} blocks, and CUDA starts at most "
                f"{_MOST_BLOCKS} in the second and third direction: split the batch, or the image"
            )
        self.kernel[self.grid](**self.options)

    def shipped(self, name: str, matmul: bool = False) -> Shipped:
        """The configuration, from arguments that may be tensors on the meta device: specialised as the
        just-in-time compiler does with memory that is aligned to 16 bytes."""
        signature: dict[str, str] = {}
        constants = dict(self.constants)
        aligned = []
        for key, value in self.arguments.items():
            if value is None or (isinstance(value, int) and value == 1):
                constants[key] = value
            elif isinstance(value, Tensor):
                signature[key] = f"*{_TYPES[value.dtype]}"
                aligned.append(key)
            elif isinstance(value, int):
                signature[key] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(key)
            elif isinstance(value, float):
                signature[key] = "fp32"
            else:  # a tensor descriptor
                signature[key] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        return Shipped(
            name,
            self.kernel,
            signature,
            constants,
            self.num_warps,
            self.num_stages,
            matmul,
            tuple(aligned),
            any(kind.startswith("tensordesc") for kind in signature.values()),
        )


def compile_together(launches: Sequence[Launch]) -> None:
    """Compiles the kernels of launches at the same time, for the current device, so that running them does
    not; their tensors may be on the meta device. One that does not compile says so when it is run."""
    import triton

    workers = max(1, min(len(launches), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(workers, "compile") as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.options)
