"""Layers whose tensors are not simply a module's parameters: functional forms and computed weights.

They have the attributes that a plan reads from ``nn.Conv2d`` and the norm modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from p2pfast.fuse.graph import Derived
from p2pfast.runtime.versions import Seen

_PURE_PARAMETRIZATIONS = (parametrizations._WeightNorm,)


class Cached:
    """A derived tensor, computed again when one of its roots has changed."""

    def __init__(self, derived: Derived) -> None:
        self.derived = derived
        self.seen: Seen | None = None
        self.tensor: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        roots = self.derived.roots()
        if self.tensor is None or self.seen is None or not self.seen.matches(roots):
            with torch.no_grad():
                self.tensor = self.derived.fetch().detach()
            self.seen = Seen(roots)
        return self.tensor


def _optional(derived: Derived | None) -> Callable[[], torch.Tensor | None]:
    if derived is None:
        return lambda: None
    return Cached(derived).value


class ConvLayer:
    """A convolution by its weight, which may be an expression of parameters, and its numbers."""

    def __init__(self, weight: Derived, bias: Derived | None, options: dict[str, Any]) -> None:
        self._weight, self._bias = Cached(weight).value, _optional(bias)
        self.transposed = bool(options["transposed"])
        self.stride = options["stride"]
        shape = self.weight.shape
        self.kernel_size = tuple(shape[2:])

    @property
    def weight(self) -> torch.Tensor:
        return self._weight()

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias()


class NormLayer:
    """A normalisation by its tensors and its numbers, as ``F.batch_norm`` and the like take them."""

    num_batches_tracked = None  # only modules count

    def __init__(self, tensors: dict[str, Derived | None], options: dict[str, Any]) -> None:
        self._tensors = {name: None if d is None else d.fetch for name, d in tensors.items()}
        self.eps = float(options["eps"])
        self.momentum = options.get("momentum")
        self.training = bool(options["training"])

    def _tensor(self, name: str) -> torch.Tensor | None:
        fetch = self._tensors.get(name)
        return None if fetch is None else fetch()

    @property
    def weight(self) -> torch.Tensor | None:
        return self._tensor("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return self._tensor("bias")

    @property
    def running_mean(self) -> torch.Tensor | None:
        return self._tensor("running_mean")

    @property
    def running_var(self) -> torch.Tensor | None:
        return self._tensor("running_var")


def attribute(owner: Any, path: str) -> Derived:
    """A parameter or buffer of a trace by its path; a replaced one is seen."""

    def fetch() -> torch.Tensor:
        return owner.fetch(path)

    return Derived(path, fetch, lambda: [fetch()])


def weight_hooks(module: nn.Module) -> list[Any]:
    """The hooks of ``torch.nn.utils.weight_norm`` and ``spectral_norm`` on a module's weight."""
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight"
    ]


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def computed_weight(
    module: Any, path: str, calls: int
) -> tuple[Derived | None, Callable[[], None] | None, str | None]:
    """A convolution's weight where it is no parameter of the module's own.

    Returns the expression, what every run has to do first (the power iteration of a spectral norm in
    training), and else the reason why it cannot be taken. ``calls`` is how often a run uses the module.
    """
    path = f"{path} {id(module):x}"  # another module may take this one's place
    hooks = weight_hooks(module)
    if hooks:
        if len(hooks) > 1:
            return None, None, "two hooks compute the weight"
        return _hooked_weight(module, path, calls, hooks[0])
    parametrized = getattr(module, "parametrizations", None)
    if parametrized is not None and "weight" in parametrized:
        return _parametrized_weight(module, path, calls, parametrized["weight"])
    return None, None, "the weight is no parameter"


def _hooked_weight(
    module: Any, path: str, calls: int, hook: Any
) -> tuple[Derived | None, Callable[[], None] | None, str | None]:
    def roots() -> list[torch.Tensor]:
        return [t for t in _tensors(module) if t is not module.bias]

    if isinstance(hook, WeightNorm):
        return Derived(f"weight_norm({path})", lambda: hook.compute_weight(module), roots), None, None

    def weight() -> torch.Tensor:
        return hook.compute_weight(module, do_power_iteration=False)

    derived = Derived(f"spectral_norm({path})", weight, roots)
    if not module.training:
        return derived, None, None
    if calls > 1:
        return None, None, "a spectral norm in training, used more than once in a run"

    def iterate() -> None:
        hook.compute_weight(module, do_power_iteration=True)

    return derived, iterate, None


def _parametrized_weight(
    module: Any, path: str, calls: int, chain: Any
) -> tuple[Derived | None, Callable[[], None] | None, str | None]:
    steps = list(chain)
    for step in steps:
        known = isinstance(step, (*_PURE_PARAMETRIZATIONS, parametrizations._SpectralNorm))
        if not known or step._forward_hooks or step._forward_pre_hooks:
            return None, None, f"the weight is parametrised by {type(step).__name__}"
    live = [s for s in steps if isinstance(s, parametrizations._SpectralNorm) and s.training]
    if live and calls > 1:
        return None, None, "a spectral norm in training, used more than once in a run"

    def roots() -> list[torch.Tensor]:
        return [*chain.parameters(), *chain.buffers()]

    def weight() -> torch.Tensor:
        # Without the power iteration, which a run does once, before anything else.
        for step in live:
            step.training = False
        try:
            return chain()
        finally:
            for step in live:
                step.training = True

    def iterate() -> None:
        chain()

    return Derived(f"parametrized({path})", weight, roots), iterate if live else None, None
