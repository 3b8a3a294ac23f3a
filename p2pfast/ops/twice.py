"""Gradients that can be differentiated again: those of an operator's reference, by PyTorch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], upstream: Tensor
) -> list[Tensor | None]:
    """The gradients of ``function(*inputs)`` for the inputs; None for one that is None or needs none.

    Of the inputs as they are, the gradient for one would also have what reaches it through another that was
    computed from it, as a block's input is in its residual; the graph outside adds that once more. So
    ``function`` is given views, each of which leads nowhere else.
    """
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in inputs]
        result = function(*own)
    needed = [t is not None and t.requires_grad for t in own]
    wanted = [t for t, need in zip(own, needed, strict=True) if t is not None and need]
    if not (wanted and result.requires_grad):
        return [None] * len(own)
    found = iter(torch.autograd.grad(result, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
