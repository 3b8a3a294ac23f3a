"""A sequence of modules whose conv-norm-activation chains run as one step each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from p2pfast import functional

Self = TypeVar("Self", bound="FusedSequential")

_PADS: dict[type[nn.Module], str] = {
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.ZeroPad2d: "zeros",
}
_NORMS: dict[type[nn.Module], str] = {nn.InstanceNorm2d: "instance", nn.BatchNorm2d: "batch"}


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module computes what ``kind`` does; parametrised ones (spectral_norm, …) do."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def activation_of(module: nn.Module) -> dict[str, Any] | None:
    """A module as the activation arguments of ``p2pfast.functional``; None if it is no known activation."""
    plain: dict[type[nn.Module], str] = {
        nn.ReLU: "relu",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.SiLU: "silu",
    }
    if type(module) in plain:
        return {"activation": plain[type(module)]}
    if type(module) is nn.LeakyReLU:
        return {"activation": "leaky_relu", "negative_slope": float(module.negative_slope)}
    if type(module) is nn.ELU:
        return {"activation": "elu", "alpha": float(module.alpha)}
    if type(module) is nn.GELU and module.approximate == "none":
        return {"activation": "gelu"}
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's own call does more than its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@dataclass
class Chain:
    """Neighbouring modules that run as one step; ``members`` are all of them, in order."""

    members: list[nn.Module]
    pad: Any = None
    conv: Any = None
    norm: Any = None
    act: dict[str, Any] | None = None

    def hooked(self) -> bool:
        """Whether something wants to see the members run one by one."""
        return bool(torch_module._has_any_global_hook()) or any(has_hooks(m) for m in self.members)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        alone = self.conv is None and self.norm is None
        if alone or isinstance(x, fx.Proxy) or x.dim() != 4 or self.hooked():
            return self._one_by_one(x, residual)
        options: dict[str, Any] = {"activation": None, **(self.act or {}), "residual": residual}
        norm = self.norm
        weight = bias = None
        if norm is not None:
            weight, bias = norm.weight, norm.bias
            options |= {"norm": _kind(norm, _NORMS), "eps": norm.eps, **norm_statistics(norm)}
        if self.conv is None:
            return functional.instance_norm_act(x, weight, bias, **options)
        if norm is None:
            options["norm"] = None
        options |= {"norm_weight": weight, "norm_bias": bias}
        conv = self.conv
        if isinstance(conv, nn.ConvTranspose2d):
            fixed: Any = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
            return functional.up_conv_norm_act(x, conv.weight, conv.bias, *fixed, **options)
        padding, mode = conv.padding, conv.padding_mode
        if self.pad is not None:
            padding, mode = int(self.pad.padding[0]), _kind(self.pad, _PADS)
        fixed = (conv.stride, padding, conv.dilation, conv.groups)
        return functional.conv_norm_act(x, conv.weight, conv.bias, *fixed, padding_mode=mode, **options)

    def _one_by_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        last = len(self.members) - (self.act is not None)  # the addition comes before the activation
        for member in self.members[:last]:
            x = member(x)
        x = x if residual is None else x + residual
        for member in self.members[last:]:
            x = member(x)
        return x


def _kind(module: nn.Module, table: dict[type[nn.Module], str]) -> str:
    return next(name for kind, name in table.items() if isinstance(module, kind))


def norm_statistics(norm: Any) -> dict[str, Any]:
    """What the norm does with its statistics in this call; counts the batch as BatchNorm does."""
    own = norm.training or norm.running_mean is None
    if isinstance(norm, nn.InstanceNorm2d):
        own = norm.training or not norm.track_running_stats
    momentum = norm.momentum or 0.0
    updated = norm.training and norm.track_running_stats and norm.running_mean is not None
    if updated and not isinstance(norm, nn.InstanceNorm2d):
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    kept = updated or not own
    return {
        "use_input_stats": own,
        "running_mean": norm.running_mean if kept else None,
        "running_var": norm.running_var if kept else None,
        "momentum": momentum,
    }


def _plain_pad(module: nn.Module) -> bool:
    """A padding module of equal amounts on all sides, which a convolution can do as it reads."""
    if type(module) not in _PADS:
        return False
    amounts = set(module.padding)  # type: ignore[arg-type]
    return len(amounts) == 1 and min(amounts) >= 0


def chains(modules: list[nn.Module]) -> list[Chain]:
    """The modules in order as chains; a module that starts none is a chain of itself."""
    found: list[Chain] = []
    i = 0
    while i < len(modules):
        chain = Chain([])
        pad = modules[i] if _plain_pad(modules[i]) else None
        at = i + (pad is not None)
        conv = modules[at] if at < len(modules) else None
        transposed = conv is not None and _is(conv, nn.ConvTranspose2d)
        ordinary = conv is not None and _is(conv, nn.Conv2d) and not isinstance(conv.padding, str)
        own_padding = ordinary and any(conv.padding)  # type: ignore[union-attr,arg-type]
        if (transposed and pad is None) or (ordinary and not (pad is not None and own_padding)):
            chain.pad, chain.conv = pad, conv
            i = at + 1
        elif pad is not None:
            found.append(Chain([pad]))
            i += 1
            continue
        start = i
        while i < len(modules) and type(modules[i]) is nn.Identity:
            i += 1
        if i < len(modules) and any(_is(modules[i], kind) for kind in _NORMS):
            chain.norm = modules[i]
            i += 1
        if chain.conv is None and chain.norm is None:
            i = start
            found.append(Chain([modules[i]]))
            i += 1
            continue
        if i < len(modules):
            chain.act = activation_of(modules[i])
            i += chain.act is not None
        members = [] if chain.pad is None else [chain.pad]
        members += [] if chain.conv is None else [chain.conv]
        chain.members = members + modules[start:i]
        found.append(chain)
    return found


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs its [pad, convolution, norm, activation] chains as one step each.

    Same children, same keys in ``state_dict``, same answers; forward and backward. A chain with a forward or
    backward hook on one of its modules runs module by module, so that the hook runs; so do modules that are
    in no chain. Traced by torch.fx it is the plain sequence, which ``p2pfast.optimize`` fuses as a whole.

    Input (N, C, H, W), whatever the children take; float32 and bfloat16 on the CPU run natively, anything
    else through PyTorch. Results of native kernels are channels_last, and live dropout draws in memory order.
    Wrong inputs raise what the plain sequence raises.

    Source: the fusion of chains is the project's own (p2pfast/ops/conv_norm_act/README.md).
    """

    @classmethod
    def from_sequential(cls: type[Self], sequence: nn.Sequential) -> Self:
        """The same modules (not copies), under the same names, so ``state_dict`` is the same too.

        Raises:
            TypeError: ``sequence`` is not an ``nn.Sequential``.
            ValueError: its modules are not those of this class.
        """
        if not isinstance(sequence, nn.Sequential):
            raise TypeError(f"sequence is {type(sequence).__name__}; give a torch.nn.Sequential")
        cls._check_modules(list(sequence))
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name, child in sequence.named_children():
            made.add_module(name, child)
        made.training = sequence.training
        return made

    def to_sequential(self) -> nn.Sequential:
        """A plain ``nn.Sequential`` of the same modules (not copies), under the same names."""
        plain = nn.Sequential()
        for name, child in self.named_children():
            plain.add_module(name, child)
        plain.training = self.training
        return plain

    @classmethod
    def _check_modules(cls, modules: list[nn.Module]) -> None:
        """Raises ValueError where a subclass cannot be made of these modules."""

    def chains(self) -> list[Chain]:
        """The children as chains; found again when the children have changed."""
        children = list(self._modules.values())
        known = self.__dict__.get("_chains")
        if (
            known is None
            or len(known[0]) != len(children)
            or any(a is not b for a, b in zip(known[0], children, strict=True))
        ):
            known = self.__dict__["_chains"] = (children, chains(list(self)))
        found: list[Chain] = known[1]
        return found

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The result of every chain, in order."""
        # Tracing must leave no mark on the module.
        for chain in chains(list(self)) if isinstance(x, fx.Proxy) else self.chains():
            x = chain(x)
            yield x

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return super().forward(input)
        for chain in self.chains():
            input = chain(input)
        return input


def make_activation(activation: str | None, negative_slope: float = 0.01) -> list[nn.Module]:
    """The modules of an activation by name: one, or none.

    Raises:
        ValueError: an unknown name.
    """
    match activation:
        case None | "none":
            return []
        case "relu":
            return [nn.ReLU(inplace=True)]
        case "leaky_relu":
            return [nn.LeakyReLU(negative_slope, inplace=True)]
        case "tanh":
            return [nn.Tanh()]
        case "sigmoid":
            return [nn.Sigmoid()]
        case "elu":
            return [nn.ELU(inplace=True)]
        case "silu":
            return [nn.SiLU(inplace=True)]
        case "gelu":
            return [nn.GELU()]
    raise ValueError(
        f"activation is {activation!r}; choose one of relu, leaky_relu, tanh, sigmoid, elu, silu, gelu, None"
    )


def make_norm(
    norm: str | None,
    channels: int,
    affine: bool | None = None,
    track_running_stats: bool | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[nn.Module]:
    """The modules of a norm by name: one, or none. None for ``affine`` and the like is the norm's default.

    Raises:
        ValueError: an unknown name.
    """
    if norm is None:
        return []
    if norm not in ("instance", "batch"):
        raise ValueError(f"norm is {norm!r}; choose one of instance, batch, None")
    kind: Any = nn.InstanceNorm2d if norm == "instance" else nn.BatchNorm2d
    default = norm == "batch"
    return [
        kind(
            channels,
            eps=eps,
            momentum=momentum,
            affine=default if affine is None else affine,
            track_running_stats=default if track_running_stats is None else track_running_stats,
            device=device,
            dtype=dtype,
        )
    ]
