"""Steps of a plan in one program against the same steps one by one, and against PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.op import ALGORITHMS

Alloc = Callable[..., Tensor]
H, W, C = 13, 18, 20
ROOM = 32
INPUT, OUTPUT, WEIGHTS, ARENA = range(4)


class Chain:
    """conv, InstanceNorm deferred into a second conv, InstanceNorm + residual, average pooling.

    Addresses come from ``place(slot, bytes)``: slot addresses for a program, real ones for single steps.
    """

    def __init__(self, algorithm: str, dtype: torch.dtype) -> None:
        self.number, self.dtype = ALGORITHMS.index(algorithm), dtype
        self.weights = [torch.randn(C, C, 3, 3) * 0.1 for _ in range(2)]
        self.biases = [torch.randn(C) for _ in range(2)]
        self.packed: list[Tensor] = []
        self.arena_size = 0
        self.names: dict[str, int] = {}
        info: dict[str, Any] = {}
        for weight in self.weights:
            call = self.conv(0, lambda slot, offset: 64, normalised=False) | {"weight": weight.data_ptr()}
            info = _C.conv_info(self.number, call)
            self.packed.append(torch.empty(max(1, info["packed_floats"])))
            _C.conv_pack(self.number, call, self.packed[-1].data_ptr())
        self.parts = info["partials"]
        image = H * W * ROOM * 4
        for name, size in {
            "workspace": info["workspace_bytes"],
            "first": image,
            "second": image,
            "sum": image,
            "partial": self.parts * 2 * ROOM * 4,
            "count": self.parts * 4,
            "scale": ROOM * 4,
            "shift": ROOM * 4,
        }.items():
            self.names[name] = self.arena_size
            self.arena_size += -(-size // 64) * 64

    def image(self, address: int, height: int = H, width: int = W) -> dict[str, Any]:
        return {
            "data": address,
            "image_stride": height * width * ROOM,
            "row_stride": width * ROOM,
            "pixel_stride": ROOM,
            "dtype": int(self.dtype == torch.bfloat16),
        }

    def conv(self, index: int, place: Callable[[int, int], int], normalised: bool) -> dict[str, Any]:
        def arena(name: str) -> int:
            return place(ARENA, self.names.get(name, 0))

        source = self.image(arena("first") if normalised else place(INPUT, 0)) | {"channels": C}
        if normalised:
            source |= {"scale": arena("scale"), "shift": arena("shift"), "norm_stride": ROOM, "act": 1}
        return {
            "sources": [source],
            "images": 1,
            "height": H,
            "width": W,
            "out_height": H,
            "out_width": W,
            "out_channels": C,
            "kernel_h": 3,
            "kernel_w": 3,
            "pad_top": 1,
            "pad_left": 1,
            "pad": 1,
            "weight": self.weights[index].data_ptr(),
            "weight_out_stride": C * 9,
            "weight_in_stride": 9,
            "packed": self.packed[index].data_ptr() if len(self.packed) > index else 0,
            "bias": self.biases[index].data_ptr(),
            "out": self.image(arena("second" if normalised else "first")),
            "partial": arena("partial"),
            "count": arena("count"),
            "workspace": arena("workspace"),
        }

    def steps(self, place: Callable[[int, int], int]) -> list[tuple[str, tuple[Any, ...]]]:
        def arena(name: str) -> int:
            return place(ARENA, self.names[name])

        merge = {name: arena(name) for name in ("partial", "count", "scale", "shift")}
        merge |= {"images": 1, "channels": C, "parts": self.parts, "eps": 1e-5}
        normalised = self.image(arena("second")) | {"channels": C, "norm_stride": ROOM}
        normalised |= {"scale": arena("scale"), "shift": arena("shift")}
        size = {"images": 1, "height": H, "width": W}
        added = self.image(place(INPUT, 0)) | {"channels": C}
        pool = {
            "out_height": 7,
            "out_width": 9,
            "kernel": 3,
            "stride": 2,
            "pad": 1,
            "count_include_pad": False,
        }
        pool |= {
            "source": self.image(arena("sum")) | {"channels": C},
            "out": self.image(place(OUTPUT, 0), 7, 9),
        }
        return [
            ("conv", (self.number, self.conv(0, place, False))),
            ("merge", (merge,)),
            ("conv", (self.number, self.conv(1, place, True))),
            ("merge", (merge,)),
            ("apply", (size | {"first": normalised, "second": added, "out": self.image(arena("sum"))},)),
            ("avg_pool", (size | pool,)),
        ]

    def program(self) -> Any:
        program = _C.Program()
        for index, (kind, arguments) in enumerate(self.steps(_C.slot_address)):
            assert getattr(program, kind)(*arguments) == index
        return program

    def memory(self, alloc: Alloc) -> tuple[Tensor, Tensor, Tensor]:
        """An input, a poisoned output and a poisoned arena."""
        x = alloc(1, H, W, ROOM, dtype=self.dtype)
        x[..., :C] = torch.randn(1, H, W, C) + 5
        out = alloc(1, 7, 9, ROOM, dtype=self.dtype)
        return x, out, alloc(self.arena_size, dtype=torch.uint8)

    def reference(self, x: Tensor) -> Tensor:
        x = x[..., :C].permute(0, 3, 1, 2).double()
        y = x
        for index in range(2):
            padded = F.pad(y, [1] * 4, mode="reflect")
            y = F.conv2d(padded, self.weights[index].double(), self.biases[index].double())
            y = F.instance_norm(y, eps=1e-5)
            y = F.relu(y) if index == 0 else y + x
        return F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)


def slots(x: Tensor, out: Tensor, arena: Tensor) -> list[int]:
    return [x.data_ptr(), out.data_ptr(), 0, arena.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "thin"])
def test_chain(cpu_level: str, buffers: Alloc, algorithm: str, dtype: torch.dtype) -> None:
    chain = Chain(algorithm, dtype)
    program = chain.program()
    assert len(program) == 6
    for _ in range(2):  # the same program, other memory
        x, out, arena = chain.memory(buffers)
        program.run(slots(x, out, arena), 0, 6)
        y = out[..., :C].permute(0, 3, 1, 2)
        tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(y.double(), chain.reference(x), rtol=tolerance, atol=tolerance)

        # The same steps one by one, with real addresses.
        single, memory = buffers(*out.shape, dtype=dtype), buffers(arena.numel(), dtype=torch.uint8)
        bases = slots(x, single, memory)
        for kind, arguments in chain.steps(lambda slot, offset, bases=bases: bases[slot] + offset):
            getattr(_C, f"run_{kind}")(*arguments)
        assert torch.equal(single[..., :C], out[..., :C])


def test_parts_of_a_program_and_times(buffers: Alloc) -> None:
    chain = Chain("winograd", torch.float32)
    program = chain.program()
    x, out, arena = chain.memory(buffers)
    assert program.run(slots(x, out, arena), 0, 6) == []
    whole = out.clone()
    out.fill_(float("nan"))
    for begin, end in ((0, 2), (2, 2), (2, 6)):
        seconds = program.run(slots(x, out, arena), begin, end, timed=True)
        assert len(seconds) == end - begin and all(0 < s < 10 for s in seconds)
    assert torch.equal(out[..., :C], whole[..., :C])


def test_two_threads_share_a_program(buffers: Alloc) -> None:
    chain = Chain("streamed", torch.float32)
    program = chain.program()
    memories = [chain.memory(buffers) for _ in range(3)]
    expected = []
    for memory in memories:
        program.run(slots(*memory), 0, 6)
        expected.append(memory[1].clone())
    wrong: list[int] = []
    count = _C.num_threads()

    def work(index: int) -> None:
        _C.set_num_threads(count)
        x, out, arena = memories[index]
        for _ in range(20):
            arena.fill_(255)
            program.run(slots(x, out, arena), 0, 6)
            if not torch.equal(out[..., :C], expected[index][..., :C]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
