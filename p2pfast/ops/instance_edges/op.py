from __future__ import annotations

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.cuda import launch, require_kernel
from p2pfast.ops.threads import use_torch_threads

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)


def _check(ids: Tensor) -> None:
    if ids.dtype not in _INTEGERS:
        raise TypeError(
            f"ids has dtype {ids.dtype}; instance ids are integers: read them as such, "
            "a conversion from floating point can merge neighbouring ids"
        )
    if ids.dim() < 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; (..., height, width) is expected")


def _rows(ids: Tensor) -> Tensor:
    """The ids as (images, height, width) with unit stride along the width: a view where there is one."""
    _check(ids)
    height, width = ids.shape[-2:]
    rows = ids.reshape(ids.shape[:-2].numel(), height, width)
    return rows if rows.stride(2) == 1 or width <= 1 else rows.contiguous()


def _numbers(rows: Tensor, edges: Tensor) -> dict[str, int]:
    images, height, width = rows.shape
    return {
        "ids": rows.data_ptr(),
        "element_size": rows.element_size(),
        "edges": edges.data_ptr(),
        "images": images,
        "height": height,
        "width": width,
        "image_stride": rows.stride(0),
        "row_stride": rows.stride(1),
    }


@torch.library.custom_op("p2pfast::instance_edges", mutates_args=(), device_types="cpu")
def instance_edges(ids: Tensor) -> Tensor:
    """Edges between instances: 1 where a pixel's id differs from its left, right, upper or lower neighbour's.

    The edge map of pix2pixHD (``get_edges``), computed from integers of any width, so ids above 32767
    and 65535 stay exact. Runs on the CPU (``torch.get_num_threads()`` threads) and on NVIDIA GPUs.

    Args:
        ids: (..., H, W), any integer dtype and any strides; the last stride is best 1 (no copy).

    Returns:
        (..., H, W) uint8, contiguous.

    Raises:
        TypeError: the ids are not integers.
        ValueError: fewer than two dimensions.
    """
    rows = _rows(ids)
    edges = torch.empty(ids.shape, dtype=torch.uint8, device="cpu")
    use_torch_threads()
    _C.instance_edges(**_numbers(rows, edges))
    return edges


@instance_edges.register_kernel("cuda")
def _on_cuda(ids: Tensor) -> Tensor:
    require_kernel("instance_edges", "instance_edges", "the ids")
    rows = _rows(ids)
    edges = torch.empty(ids.shape, dtype=torch.uint8, device=ids.device)
    launch("instance_edges", ids.device, **_numbers(rows, edges))
    return edges


@instance_edges.register_fake
def _(ids: Tensor) -> Tensor:
    _check(ids)
    return torch.empty(ids.shape, dtype=torch.uint8, device=ids.device)
