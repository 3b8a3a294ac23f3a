from __future__ import annotations

import torch
from torch import Tensor

# PyTorch compares no wider unsigned integers; a signed view keeps equality.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def instance_pool_reference(features: Tensor, ids: Tensor) -> Tensor:
    """Instance-wise average pooling, one instance after the other: the definition of right.

    Every feature becomes its mean over the pixels of the same instance of the same image, as in the encoder
    of pix2pixHD (Wang et al. 2018, https://arxiv.org/abs/1711.11585, section 3.4).

    Args:
        features: (N, C, H, W), any floating-point dtype: the dtype computed in.
        ids: (N, H, W) or (N, 1, H, W), any integer dtype.

    Returns:
        (N, C, H, W), differentiable with respect to the features.
    """
    ids = ids.contiguous()
    ids = ids.view(SIGNED.get(ids.dtype, ids.dtype)).view(features.shape[0], 1, *features.shape[2:])
    images = []
    for image, own in zip(features, ids, strict=True):
        pooled = torch.zeros_like(image)
        for instance in own.unique():
            here = own == instance
            mean = torch.where(here, image, 0).sum((1, 2), keepdim=True) / here.sum()
            pooled = torch.where(here, mean, pooled)
        images.append(pooled)
    return torch.stack(images) if images else torch.zeros_like(features)
