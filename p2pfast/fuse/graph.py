"""The fused graph: what a network computes, with normalisation, activation and padding deferred.

A :class:`View` is a value as its consumer sees it: a stored tensor (its *base*) and what is still to
be done to it on load. Operations read views and write bases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Act:
    """An activation; ``slope`` is LeakyReLU's slope or ELU's alpha."""

    kind: str
    slope: float = 0.0


@dataclass(frozen=True)
class Norm:
    """A normalisation by the module at ``path``.

    ``kind``: "instance" (statistics of each image), "batch" (of the whole batch) or "frozen" (stored).
    """

    path: str
    kind: str


@dataclass(frozen=True)
class Padding:
    """Padding not yet done: ``mode`` is "zeros", "reflect" or "replicate"; amounts in pixels."""

    mode: str
    left: int
    right: int
    top: int
    bottom: int


@dataclass(frozen=True, eq=False)
class View:
    """act(norm(base)), padded; compared by identity, as tensors are."""

    base: int
    norm: Norm | None = None
    act: Act | None = None
    pad: Padding | None = None


@dataclass(frozen=True, eq=False)
class Concat:
    """Views side by side along the channels; ``act`` applies to all."""

    parts: tuple[View, ...]


@dataclass(frozen=True, eq=False)
class Opaque:
    """A Python value outside the graph: an input, or what an unfused operation returned."""

    node: str


@dataclass(frozen=True, eq=False)
class Derived:
    """A parameter or buffer, or what a network computes from them alone.

    ``fetch`` makes it, ``roots`` gives the tensors it is made of; ``name`` is the same for the same
    expression.
    """

    name: str
    fetch: Callable[[], Any]
    roots: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map, average-pooled ``level`` times, then padded."""

    node: str
    level: int
    pad: Padding | None = None


@dataclass
class Base:
    """A stored tensor of logical shape (N, C, H, W)."""

    shape: tuple[int, int, int, int]


@dataclass
class Op:
    """An operation; ``name`` is the traced node it stands for."""

    name: str
    out: int = -1


@dataclass
class ConvOp(Op):
    inputs: tuple[View, ...] = ()
    path: str = ""
    pad_mode: str = "zeros"
    pad_top: int = 0
    pad_left: int = 0
    act: Act | None = None
    # On the way out, before ``act``: a "frozen" normalisation, then an addition (plans for GPUs).
    norm: Norm | None = None
    residual: View | None = None


@dataclass
class LabelConvOp(Op):
    labels: Labels | None = None
    path: str = ""
    reflect: bool = True


@dataclass
class AddOp(Op):
    left: View | None = None
    right: View | None = None
    act: Act | None = None


@dataclass
class ApplyOp(Op):
    """Stores a view; with ``dropout`` > 0 its elements are dropped at that rate."""

    view: View | None = None
    dropout: float = 0.0


@dataclass
class PoolOp(Op):
    view: View | None = None
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    count_include_pad: bool = True


@dataclass
class ImportOp(Op):
    """Brings a tensor from outside into the graph."""

    node: str = ""


@dataclass
class ForeignOp(Op):
    """Runs as it did: ``call`` with arguments in which views stand for tensors.

    A ``copies`` operation only reads its views; what others return may share their memory.
    """

    call: Callable[..., Any] | None = None
    args: Any = None
    kwargs: Any = None
    reason: str = ""
    copies: bool = False


@dataclass
class Graph:
    """Operations in order, their bases, and the structure of views that is returned."""

    ops: list[Op] = field(default_factory=list)
    bases: list[Base] = field(default_factory=list)
    result: Any = None
    inputs: list[str] = field(default_factory=list)
    channels_last: set[View] = field(default_factory=set)  # results that PyTorch would return in that layout
    notes: list[tuple[str, str]] = field(default_factory=list)
    layers: dict[str, Any] = field(default_factory=dict)  # by path: modules, or stand-ins of functional forms
    before: list[Callable[[], None]] = field(default_factory=list)  # what every run begins with

    def new_base(self, shape: torch.Size | tuple[int, ...]) -> int:
        n, c, h, w = (int(s) for s in shape)
        self.bases.append(Base((n, c, h, w)))
        return len(self.bases) - 1


def map_views(value: Any, f: Any) -> Any:
    """Applies ``f`` to every graph value inside nested lists, tuples, dictionaries and slices."""
    if isinstance(value, (View, Concat, Opaque, Labels, Derived)):
        return f(value)
    if isinstance(value, (list, tuple)):
        items = [map_views(v, f) for v in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {k: map_views(v, f) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(map_views(value.start, f), map_views(value.stop, f), map_views(value.step, f))
    return value
