from __future__ import annotations

import torch
from torch import Tensor


def instance_edges_reference(ids: Tensor) -> Tensor:
    """Edges between instances in plain PyTorch: the definition of right.

    The rule of pix2pixHD's ``get_edges`` (Wang et al. 2018, https://arxiv.org/abs/1711.11585, section 3.3):
    a pixel is an edge if its id differs from that of its left, right, upper or lower neighbour.

    Args:
        ids: (..., H, W), any integer dtype.

    Returns:
        (..., H, W) uint8, 1 on an edge and 0 elsewhere.
    """
    # PyTorch has no comparison for the wider unsigned dtypes; a signed view keeps equality.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    ids = ids.contiguous()
    ids = ids.view(signed.get(ids.dtype, ids.dtype))
    across = ids[..., :, 1:] != ids[..., :, :-1]
    down = ids[..., 1:, :] != ids[..., :-1, :]
    edges = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    edges[..., :, 1:] |= across
    edges[..., :, :-1] |= across
    edges[..., 1:, :] |= down
    edges[..., :-1, :] |= down
    return edges.to(torch.uint8)
