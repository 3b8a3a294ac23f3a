"""The networks of a run: built by their published names, drawn weights, made ready to run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p2pfast.errors import UsageError
from p2pfast.models import CheckpointError, build, read_state_dict
from p2pfast.train.config import Config
from p2pfast.train.parallel import Place


def generator(netG: str, input_nc: int, output_nc: int, ngf: int, norm: str, dropout: bool) -> nn.Module:
    """The generator ``unet_S`` or ``resnet_Nblocks``. Raises UsageError for other names."""
    shared: dict[str, Any] = {"input_nc": input_nc, "output_nc": output_nc, "ngf": ngf, "norm": norm}
    shared["use_dropout"] = dropout
    if (match := re.fullmatch(r"unet_(\d+)", netG)) and int(match[1]) in (2**n for n in range(5, 13)):
        return build("unet_256", num_downs=int(match[1]).bit_length() - 1, **shared)
    if match := re.fullmatch(r"resnet_(\d+)blocks", netG):
        return build("resnet_9blocks", n_blocks=int(match[1]), **shared)
    raise UsageError(f"--netG {netG}: use unet_32, unet_64, … or resnet_Nblocks, such as resnet_9blocks")


def discriminator(netD: str, input_nc: int, ndf: int, n_layers: int, norm: str) -> nn.Module:
    """pix2pix's PatchGAN: ``basic``, ``n_layers`` or ``pixel``."""
    if netD == "pixel":
        return build("pixel", input_nc=input_nc, ndf=ndf, norm=norm)
    layers = n_layers if netD == "n_layers" else 3
    return build("n_layers", input_nc=input_nc, ndf=ndf, n_layers=layers, norm=norm)


def least_side(n_layers: int) -> int:
    """Of a picture, for a PatchGAN to judge a patch: halvings, then two layers of 4x4 with stride 1."""
    return int(3 * 2**n_layers)


def least_side_of(netD: str, n_layers: int) -> int:
    """The same for pix2pix's discriminators and ResNets, which reflect 3 pixels and twice halve."""
    return 8 if netD == "pixel" else max(8, least_side(n_layers if netD == "n_layers" else 3))


def draw_weights(network: nn.Module, init_type: str = "normal", gain: float = 0.02) -> None:
    """pix2pix's and CycleGAN's: convolutions by ``init_type``, biases zero, norms N(1, gain)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            match init_type:
                case "normal":
                    nn.init.normal_(module.weight, 0.0, gain)
                case "xavier":
                    nn.init.xavier_normal_(module.weight, gain=gain)
                case "kaiming":
                    nn.init.kaiming_normal_(module.weight, a=0, mode="fan_in")
                case "orthogonal":
                    nn.init.orthogonal_(module.weight, gain=gain)
                case _:
                    raise ValueError(f"init_type={init_type!r}; use normal, xavier, kaiming or orthogonal")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, gain)
            nn.init.zeros_(module.bias)


def draw_weights_hd(network: nn.Module) -> None:
    """pix2pixHD's initialisation: weights N(0, 0.02), norms N(1, 0.02), convolutions' biases as PyTorch has
    them."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def take_pretrained(network: nn.Module, path: Path) -> str:
    """Load what fits of a checkpoint, as pix2pixHD takes its global network into the enhanced one.

    Returns:
        How much was taken, in words.

    Raises:
        UsageError: the file cannot be read or nothing in it fits.
    """
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        raise UsageError(f"--load-pretrain: {error}") from error
    own = network.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if not any(value.dim() > 1 for value in fitting.values()):
        raise UsageError(f"--load-pretrain: no tensor of {path} fits {type(network).__name__}")
    network.load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of {len(own)} tensors from {path}"


# PyTorch 2.13 renames the option and warns of the old name.
_OWN_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


class Running:
    """A network as training calls it: fused or compiled, and shared among processes.

    ``network`` keeps the weights under the published keys; what is called shares them.
    """

    def __init__(self, network: nn.Module, config: Config, place: Place) -> None:
        self.network, self.place = network, place
        self.fast: nn.Module = network
        if config.compile:
            self.fast = torch.compile(network)  # type: ignore[assignment]
        elif config.fused:
            from p2pfast.fuse.optimize import optimize

            self.fast = optimize(network, mode="train")
        self.shared: DistributedDataParallel | None = None
        self.share()

    def share(self) -> None:
        """(Re)build the exchange of gradients; needed when other parameters come to learn."""
        if self.place.world > 1:
            self.shared = None  # its hooks go first
            # Buffers are each process's own: a broadcast between two calls would break the first's backward.
            self.shared = DistributedDataParallel(self.fast, **_OWN_BUFFERS)

    def __call__(self, *inputs: Tensor) -> Any:
        if self.shared is not None and torch.is_grad_enabled():
            if any(parameter.requires_grad for parameter in self.network.parameters()):
                return self.shared(*inputs)
        return self.fast(*inputs)


@contextmanager
def frozen(*runs: Running) -> Iterator[None]:
    """No gradients for the parameters of these networks; gradients still flow through them."""
    parameters = [p for run in runs for p in run.network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def unchanged_buffers(run: Running) -> Iterator[None]:
    """Calls made inside leave no trace in the network's running statistics."""
    before = [buffer.clone() for buffer in run.network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(run.network.buffers(), before, strict=True):
                buffer.copy_(value)


@contextmanager
def exchanging(now: bool, *runs: Running) -> Iterator[None]:
    """Whether backward passes of calls made inside exchange gradients; the last of several batches does."""
    with ExitStack() as stack:
        for run in runs:
            if run.shared is not None and not now:
                stack.enter_context(run.shared.no_sync())
        yield
