from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_conv_reference(
    labels: Tensor,
    edges: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int,
    pool_levels: int = 0,
    padding_mode: str = "reflect",
) -> Tensor:
    """The first convolution of pix2pixHD's generators through the one-hot tensor: the definition of right.

    As published (Wang et al. 2018, https://arxiv.org/abs/1711.11585): ``encode_input`` builds the one-hot
    channels and appends the edge map, ``LocalEnhancer`` pools its input for the coarse generator, and each
    generator starts with a padding of ``kernel // 2`` and a convolution of stride 1.

    Args:
        labels: (N, H, W), any integer dtype, values in [0, num_classes).
        edges: (N, H, W), any dtype, nonzero on an edge; or None.
        weight: (Cout, num_classes + (edges is given), K, K), any floating-point dtype: the dtype computed in.
        bias: (Cout,) or None.
        num_classes: channels of the one-hot tensor.
        pool_levels: how often the input is halved by average pooling first.
        padding_mode: ``"reflect"`` or ``"zeros"``.

    Returns:
        (N, Cout, H', W') in the weight's dtype, with H' = ceil(H / 2 ** pool_levels) and W' alike.
    """
    x = F.one_hot(labels.long(), num_classes).permute(0, 3, 1, 2).to(weight.dtype)
    if edges is not None:
        x = torch.cat([x, (edges != 0).unsqueeze(1).to(weight.dtype)], 1)
    for _ in range(pool_levels):
        x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
    padding = [weight.shape[-1] // 2] * 4
    x = F.pad(x, padding, mode="reflect" if padding_mode == "reflect" else "constant")
    return F.conv2d(x, weight, bias)
