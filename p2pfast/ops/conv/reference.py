from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops.conv.activation import activate


def conv_reference(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    transposed: bool = False,
    padding_mode: str = "zeros",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_act: str = "none",
    input_slope: float = 0.0,
    act: str = "none",
    slope: float = 0.0,
) -> Tensor:
    """A convolution and what is fused around it in plain PyTorch: the definition of right.

    ``act(conv(pad(input_act(scale * cat(x) + shift)), weight) + bias)``, in any floating-point dtype; the
    arguments are those of ``conv``.

    Returns:
        (N, Cout, H', W').
    """
    x = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
    if scale is not None and shift is not None:
        x = x * scale[..., None, None].to(x.dtype) + shift[..., None, None].to(x.dtype)
    x = activate(x, input_act, input_slope)
    if transposed:
        y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    elif padding_mode == "zeros" or padding == 0:
        y = F.conv2d(x, weight, bias, stride, padding)
    else:
        y = F.conv2d(F.pad(x, [padding] * 4, mode=padding_mode), weight, bias, stride)
    return activate(y, act, slope)
