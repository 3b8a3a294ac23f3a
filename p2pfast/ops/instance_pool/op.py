from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.cuda import launch, require_kernel
from p2pfast.ops.instance_pool.reference import SIGNED
from p2pfast.ops.pointwise import TYPES, dense
from p2pfast.ops.threads import use_torch_threads

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *SIGNED)


def _check(features: Tensor, ids: Tensor) -> None:
    if features.dtype not in TYPES:
        raise TypeError(
            f"features has dtype {features.dtype}; float32, bfloat16 or float16 is expected "
            "(instance_pool_reference takes others)"
        )
    if features.dim() != 4:
        raise ValueError(f"features has shape {tuple(features.shape)}; (N, C, H, W) is expected")
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"ids has dtype {ids.dtype}; instance ids are integers: read them as such")
    images, _, height, width = features.shape
    if ids.shape not in ((images, height, width), (images, 1, height, width)):
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; features of shape {tuple(features.shape)} need "
            f"{(images, height, width)} or {(images, 1, height, width)}"
        )
    if ids.device != features.device:
        raise ValueError(f"ids is on {ids.device}, features on {features.device}; move one of them")


def _strides(x: Tensor) -> dict[str, int]:
    """The shape and strides of a result of ``dense``, whose pixels are in one row."""
    images, channels, height, width = x.shape
    planes = x.is_contiguous()
    pixels = height * width
    return {
        "images": images,
        "channels": channels,
        "pixels": pixels,
        "image_stride": channels * pixels,
        "channel_stride": pixels if planes else 1,
        "pixel_stride": 1 if planes else channels,
    }


class Regions(NamedTuple):
    """Instances of a batch: ``region`` of each pixel (N * H * W), ``order`` the pixels region by region,
    ``start`` (regions + 1) where a region begins there, ``first_chunk`` (regions + 1) how many chunks of a
    given number of pixels those before it have; all int64."""

    region: Tensor
    order: Tensor
    start: Tensor
    first_chunk: Tensor


def sorted_regions(ids: Tensor, images: int, chunk: int) -> Regions:
    """Sorts the pixels by image and instance; stable, so always in the same order. Waits for the device once,
    to know how many regions there are."""
    ids = ids.contiguous()
    ids = ids.view(SIGNED.get(ids.dtype, ids.dtype)).view(images, -1)
    found, order = ids.sort(dim=1, stable=True)
    begins = torch.ones_like(found, dtype=torch.bool)
    torch.ne(found[:, 1:], found[:, :-1], out=begins[:, 1:])
    pixels = ids.shape[1]
    order = (order + torch.arange(images, device=ids.device)[:, None] * pixels).view(-1)
    region = torch.empty_like(order)
    region[order] = begins.view(-1).cumsum(0) - 1
    start = torch.cat([begins.view(-1).nonzero().view(-1), order.new_full((1,), images * pixels)])
    chunks = (start.diff() + (chunk - 1)) // chunk
    return Regions(region, order, start, torch.cat([order.new_zeros(1), chunks.cumsum(0)]))


@torch.library.custom_op("p2pfast::instance_pool", mutates_args=(), device_types="cpu")
def instance_pool(features: Tensor, ids: Tensor) -> Tensor:
    """Replaces every feature by its mean over the pixels of the same instance of the same image.

    The instance-wise average pooling of pix2pixHD's encoder. Runs on the CPU (``torch.get_num_threads()``
    threads) and on NVIDIA GPUs, where it waits for the device once; sums have a fixed order. It is its own
    derivative: the gradient is pooled in the same way, any number of times.

    Args:
        features: (N, C, H, W), float32, bfloat16 or float16; contiguous or channels_last (others are copied).
        ids: (N, H, W) or (N, 1, H, W), any integer dtype, any values.

    Returns:
        (N, C, H, W) of the features' dtype and memory format.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit, or different devices.
    """
    _check(features, ids)
    features = dense(features.detach())
    if features.numel() == 0:
        return torch.empty_like(features)
    single = features.float()
    out = torch.empty_like(single)
    ids = ids.contiguous()
    shape = _strides(single)
    regions = torch.empty(ids.numel(), dtype=torch.int32, device="cpu")
    first = torch.empty(shape["images"] + 1, dtype=torch.int64, device="cpu")
    use_torch_threads()
    numbers = {"regions": regions.data_ptr(), "first": first.data_ptr()}
    _C.instance_regions(
        ids=ids.data_ptr(),
        element_size=ids.element_size(),
        images=shape["images"],
        pixels=shape["pixels"],
        **numbers,
    )
    _C.instance_pool(features=single.data_ptr(), out=out.data_ptr(), **shape, **numbers)
    return out.to(features.dtype)


@instance_pool.register_kernel("cuda")
def _on_cuda(features: Tensor, ids: Tensor) -> Tensor:
    require_kernel("instance_pool", "instance_pool", "features and ids")
    _check(features, ids)
    features = dense(features.detach())
    out = torch.empty_like(features)
    if features.numel() == 0:
        return out
    shape = _strides(features)
    found = sorted_regions(ids, shape["images"], _C.CUDA_POOL_CHUNK)
    regions = found.start.numel() - 1
    chunks = found.order.numel() // _C.CUDA_POOL_CHUNK + regions
    partials = features.new_empty(chunks * shape["channels"], dtype=torch.float64)
    means = features.new_empty(regions * shape["channels"], dtype=torch.float32)
    launch(
        "instance_pool",
        features.device,
        features=features.data_ptr(),
        out=out.data_ptr(),
        type=TYPES[features.dtype],
        **shape,
        region=found.region.data_ptr(),
        order=found.order.data_ptr(),
        start=found.start.data_ptr(),
        first_chunk=found.first_chunk.data_ptr(),
        regions=regions,
        chunks=chunks,
        partials=partials.data_ptr(),
        means=means.data_ptr(),
    )
    return out


@instance_pool.register_fake
def _(features: Tensor, ids: Tensor) -> Tensor:
    _check(features, ids)
    return torch.empty_like(dense(features))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return instance_pool(grad, ctx.saved_tensors[0]), None


instance_pool.register_autograd(_backward, setup_context=_setup)
