"""Results that are not kept for the backward pass but made again, from what their own backward pass keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.lowering import without_autocast
from p2pfast.ops.norm_act.op import norm_act


class Recipe(Protocol):
    """Attached to a result as ``_p2pfast_recipe``."""

    version: int
    """Of the result it describes."""

    def make(self) -> Tensor: ...


def recipe_of(x: Tensor) -> Recipe | None:
    """How ``x`` can be made again; None if it cannot, or has been changed in place."""
    recipe: Recipe | None = getattr(x, "_p2pfast_recipe", None)
    return None if recipe is None or recipe.version != x._version else recipe


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None)


def kept_as_recipes(
    recipes: Sequence[tuple[Tensor, Recipe | None]],
) -> contextlib.AbstractContextManager[Any]:
    """Within it, autograd keeps the recipe where it would keep the tensor. What it unpacks has the tensor's
    place in the graph, so that a gradient can be differentiated."""
    # Not the tensors themselves: autograd keeps the functions.
    known = {_identity(x): recipe for x, recipe in recipes if recipe is not None}
    if not known:
        return contextlib.nullcontext()

    def pack(t: Tensor) -> Tensor | _Kept:
        recipe = known.get(_identity(t))
        return t if recipe is None else _Kept(recipe)

    def unpack(kept: Tensor | _Kept) -> Tensor:
        return kept.recipe.make() if isinstance(kept, _Kept) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _identity(t: Tensor) -> tuple[object, ...]:
    """Tells apart tensors of different values, views of the same memory among them."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_neg(), t.is_conj()


@dataclass
class _Kept:
    recipe: Recipe


@dataclass
class NormRecipe:
    """Of a layer with a norm."""

    raw: Tensor
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    act: str
    slope: float
    version: int
    parameter_versions: tuple[int, ...]

    def make(self) -> Tensor:
        """The output.

        Raises:
            RuntimeError: the norm's parameters have changed since.
        """
        if versions(self.weight, self.bias) != self.parameter_versions:
            raise RuntimeError(
                "the weight or bias of a norm was modified by an inplace operation after the forward pass; "
                "run the backward pass before the optimiser's step"
            )
        statistics = self.weight, self.bias, self.mean, self.variance
        with torch.no_grad(), without_autocast(self.raw.device.type):
            return norm_act(self.raw, *statistics, False, self.eps, self.act, self.slope)[0]


@dataclass
class Itself:
    """A tensor that is kept."""

    tensor: Tensor
    version: int

    def make(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor needed for gradients was modified by an inplace operation after the forward pass"
            )
        return self.tensor.detach()


def joined(tensors: Sequence[Tensor], act: str, slope: float) -> Tensor:
    """``act(torch.cat(tensors, 1))``, channels_last; each value is read and written once."""
    first = tensors[0]
    channels = [t.shape[1] for t in tensors]
    result = torch.empty(
        (first.shape[0], sum(channels), *first.shape[2:]),
        dtype=first.dtype,
        device=first.device,
        memory_format=torch.channels_last,
    )
    for part, x in zip(result.split(channels, 1), tensors, strict=True):
        match act:
            case "relu":
                torch.clamp_min(x, 0, out=part)
            case "leaky_relu":
                torch.ops.aten.leaky_relu.out(x, slope, out=part)
            case _:
                part.copy_(x)
    # The rest has no form that writes into a part.
    return result if act in ("relu", "leaky_relu") else activate(result, act, slope)


@dataclass
class JoinedRecipe:
    """Of tensors side by side along the channels, and an activation."""

    parts: list[Recipe]
    act: str
    slope: float
    device: str  # its kind
    version: int = 0
    made: list[Tensor] = field(default_factory=list)

    def make(self) -> Tensor:
        """The result, which stays until ``take``: where an activation follows, two backward passes in a row
        need it, that of the layer behind and the activation's."""
        if self.made:
            return self.made[0]
        with torch.no_grad(), without_autocast(self.device):
            result = joined([part.make() for part in self.parts], self.act, self.slope)
        if self.act != "none":
            self.made.append(result)
        return result

    def take(self) -> Tensor:
        result = self.make()
        self.made.clear()
        return result
