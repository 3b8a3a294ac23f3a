"""The Triton kernels that published networks launch at full size, compiled without a GPU.

    python tests/gpu_runtime/launches.py                                 all cases for sm_90
    python tests/gpu_runtime/launches.py "train unet_256" --targets 80   those with all of these words
    python tests/gpu_runtime/launches.py --timed --list                  only how many there are

Networks run on the meta device, where launches are only noted, with their sizes and strides: plans as they
are without measuring, and steps of training with every way that would be timed. With --timed, plans are made
with each form of a convolution and each tile that a device would time. The exit status is 1 where a kernel
spills registers, does not fit, or lacks tensor-core instructions. Triton keeps on disk what it has compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import p2pfast
from p2pfast import functional, labelmap
from p2pfast.fuse.source import ModuleSource
from p2pfast.fuse.steps import CHAINS, Program
from p2pfast.ops.conv import triton as convolutions
from p2pfast.ops.conv.gpu import call, choice, source
from p2pfast.ops.conv.gpu.configs import Machine
from p2pfast.ops.conv_norm_act import convolution, on_gpu
from p2pfast.ops.conv_norm_act import op as training
from p2pfast.ops.gpu import Launch, Shipped, interpreted
from p2pfast.ops.gpu.compile import SHARED_LIMIT, TARGETS, compile_each
from p2pfast.ops.norm import triton as norms
from p2pfast.ops.norm_act import op as norm_act
from p2pfast.ops.norm_act import triton as norm_act_kernels
from p2pfast.ops.weight_gradient import triton as weight_gradients
from p2pfast.runtime.gpu import forms
from p2pfast.runtime.gpu.engine import CudaEngine

META = torch.device("meta")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MATRIX_KERNELS = ("conv_kernel", "thin_kernel", "_products_kernel")
MOST_TIMED = 6  # tiles of a convolution: four, and two of them with descriptors


@dataclass(frozen=True)
class Case:
    """A network and its input; of training, a step in ``dtype`` under autocast."""

    network: str
    height: int
    width: int
    images: int = 1
    dtype: torch.dtype = torch.bfloat16
    train: bool = False

    def __str__(self) -> str:
        what = "train " if self.train else ""
        return f"{what}{self.network} {self.width}x{self.height} batch {self.images} {str(self.dtype)[6:]}"


def cases() -> list[Case]:
    found = [Case("pix2pixhd-local", 1024, 2048, images, dtype) for dtype in DTYPES for images in (1, 8)]
    for network in ("resnet_9blocks", "unet_256"):
        found += [Case(network, size, size, dtype=dtype) for dtype in DTYPES for size in (256, 1024)]
    for dtype in DTYPES:
        for network in ("pix2pixhd-global", "pix2pixhd-multiscale-d"):
            found.append(Case(network, 512, 1024, dtype=dtype, train=True))
        for network in ("unet_256", "basic"):
            found.append(Case(network, 256, 256, dtype=dtype, train=True))
    return found


def pretend(targets: list[int]) -> None:
    """Meta tensors are taken for those of a GPU under autocast; nothing looks at their values."""
    for module in (call, source, norms, norm_act_kernels, weight_gradients):
        module.check_tensor = lambda *_: None
    for module in (norm_act, training):
        module.is_fused = lambda x, act: True
    norm_act._norm_act, norm_act._norm_act_backward = norm_act_kernels.forward, norm_act_kernels.backward
    functional.on_kernels = lambda x: True
    convolution._own = lambda x: on_gpu
    convolution.fastest = lambda key, *ways, device: [way() for way in ways][-1]
    labelmap._check_range = lambda *_: None
    torch.is_autocast_enabled = lambda *_: True
    torch.autocast = lambda *_, **__: nullcontext()
    least = min(targets)
    machine = Machine(shared=SHARED_LIMIT[least], descriptors=least >= 90)
    for module in (choice, on_gpu, weight_gradients):
        module.machine = lambda device: machine


def nth_likeliest(rank: int) -> Callable[..., choice.Choice]:
    """In the place of ``choose``: the tile of that rank among those that a device would time."""

    def choose(problem: choice.Problem, device: torch.device, library: bool = True) -> choice.Choice:
        likeliest = choice.contenders(problem, choice.estimated(problem, device)[0], device)
        return choice.Choice(likeliest[min(rank, len(likeliest) - 1)])

    return choose


def infer(case: Case, net: torch.nn.Module, timed: bool) -> None:
    shape = case.images, 1, case.height, case.width
    given: Any = torch.empty(case.images, 3, case.height, case.width, device=META)
    if case.network == "pix2pixhd-local":
        labels = torch.empty(shape, dtype=torch.uint8, device=META)
        given = p2pfast.LabelMap(labels, labels.int(), num_classes=35)
    ways: list[tuple[str | None, int]] = [(None, 0)]
    if timed:
        ways += [(forms.LIBRARY, 0), *itertools.product((forms.PROLOGUE, forms.APPLIED), range(MOST_TIMED))]
    for form, rank in ways:
        convolutions.choose = nth_likeliest(rank)
        arguments = ModuleSource(net.eval()), case.dtype, torch.float32, META, lambda *_: None
        CudaEngine(*arguments, form=form).run((given,), {})


def train(case: Case, net: torch.nn.Module) -> None:
    """Forward and backward; a discriminator's input has a gradient, a generator's has not."""
    judges = case.network in ("basic", "pix2pixhd-multiscale-d")
    first = next(net.parameters())
    x = torch.empty(case.images, first.shape[1], case.height, case.width, device=META)
    origin = ModuleSource(net.train())
    _, tensors, arguments = origin.bind((x,), {}, META)
    program = Program(origin.capture(arguments, tensors, torch.float32), CHAINS)
    torch.get_autocast_dtype = lambda *_: case.dtype
    results = pytree.tree_leaves(program.run([x.requires_grad_(judges)]))
    wanted = [*net.parameters(), *([x] if judges else [])]
    torch.autograd.grad(results, wanted, [torch.empty_like(r) for r in results], allow_unused=True)


def name_of(config: Shipped) -> str:
    """A kernel with those of its constants that tell what it is for."""
    told = {k: v for k, v in config.constexprs.items() if v not in (None, 0, 1, "none")}
    kinds = sorted({kind for kind in config.signature.values() if kind.startswith("*")})
    return f"{config.kernel.__name__} {' '.join(kinds)} " + " ".join(f"{k}={v}" for k, v in told.items())


def multiplies(config: Shipped) -> bool:
    """Whether tensor cores have something to do."""
    given = config.constexprs
    matrix = config.kernel.__name__ in MATRIX_KERNELS and given.get("PASS") != "merge"
    return matrix and given["PRECISION"] != "ieee"


def launched(case: Case, timed: bool) -> dict[str, Shipped]:
    """What a case launches, by what is compiled."""
    found: dict[str, Shipped] = {}

    def note(launch: Launch) -> None:
        config = launch.shipped("")
        named = {"name": name_of(config), "matmul": multiplies(config)}
        found.setdefault(repr(config), dataclasses.replace(config, **named))

    Launch.run = note
    with META:
        net = p2pfast.models.build(case.network)
    if case.train:
        train(case, net)
    else:
        infer(case, net, timed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chosen", nargs="*", default=[""], help="words of the names of cases")
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=[90])
    parser.add_argument("--timed", action="store_true", help="what would be timed of plans, too")
    parser.add_argument("--list", action="store_true", help="compile nothing")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted")
    os.environ |= {"P2PFAST_STRICT": "1", "P2PFAST_TUNE": "off"}
    pretend(options.targets)
    known: dict[str, Shipped] = {}
    for case in cases():
        if any(set(words.split()) <= set(str(case).split()) for words in options.chosen):
            found = launched(case, options.timed)
            kinds = Counter(config.kernel.__name__ for config in found.values())
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            print(f"{case}: {len(found.keys() - known.keys())} new of {told}", flush=True)
            known |= found
    if options.list:
        return 0
    start = time.time()
    results = compile_each([("launch", c, target) for c in known.values() for target in options.targets])
    wrong = [r for r in results if r.problems]
    for r in wrong:
        print(f"sm_{r.target}, {r.warps} warps, {r.stages} stages, {r.name}: {'; '.join(r.problems)}")
    print(f"{len(results)} compiled in {time.time() - start:.0f} s, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
