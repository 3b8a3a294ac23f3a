"""GPU kernels of normalisation for training: forward with those of ``p2pfast.ops.norm.triton``, and backward.

Both memory formats are read as they are. With n = (x - mean) rstd, z = weight n + bias + residual and
dz = grad act'(z), the backward pass needs sum(dz) and sum(dz n) of the values that share statistics before it
can write dx: a map that fits in the registers of one program is read once, others twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.gpu import Launch, Shipped, check_tensor, on_device
from p2pfast.ops.gpu.device import activation_gradient, inverse_root, store
from p2pfast.ops.norm.triton import (
    GROUP,
    Layout,
    floats,
    layout,
    load,
    map_offsets,
    map_tiles,
    normalise,
    power_of_2,
    tile_base,
    tile_offsets,
    tiles,
)

import triton  # isort: skip
import triton.language as tl  # isort: skip

# Elements of the largest map that one program keeps in registers, of x and of the gradient.
RESIDENT = 16384
# Elements of a tile: there are three or four of them.
TILE = 2048


@triton.jit
def _channel_values(mean, variance, weight, bias, instance, channel, channels, eps):
    """mean, 1 / deviation, weight and bias of a program's channels, all (1, CB)."""
    there = channel < channels
    at = instance * channels + channel
    center = tl.load(mean + at, mask=there, other=0.0)
    rstd = inverse_root(tl.load(variance + at, mask=there, other=1.0) + eps)
    gain = tl.full(channel.shape, 1.0, tl.float32)
    if weight is not None:
        gain = tl.load(weight + channel, mask=there, other=0.0)
    offset = tl.zeros(channel.shape, tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=there, other=0.0)
    return center[None, :], rstd[None, :], gain[None, :], offset[None, :]


@triton.jit
def _map_kernel(
    x, grad, residual, mean, variance, weight, bias, dx, dresidual, sums,
    values, pixels, channels,
    x_image, x_stride, grad_image, grad_stride, residual_image, residual_stride, eps, slope,
    FROZEN: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, PLANES: tl.constexpr,
    OVER_BATCH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A whole map of CB channels in registers. sums is (instances, 2, channels): of dz and of dz n."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    image = tl.program_id(1).to(tl.int64)
    there = channel < channels
    row = tl.arange(0, BP)
    if EVEN:
        mask = None
    else:
        mask = (row < values)[:, None] & there[None, :]
    center, rstd, gain, offset = _channel_values(mean, variance, weight, bias, image, channel, channels, eps)
    at = map_offsets(row, channel, pixels, x_image, x_stride, PLANES, OVER_BATCH)
    n = (load(x + image * x_image + at, mask).to(tl.float32) - center) * rstd
    of_grad = map_offsets(row, channel, pixels, grad_image, grad_stride, PLANES, OVER_BATCH)
    dz = load(grad + image * grad_image + of_grad, mask).to(tl.float32)
    if ACT != 0:
        z = n * gain + offset
        if residual is not None:
            of_residual = map_offsets(
                row, channel, pixels, residual_image, residual_stride, PLANES, OVER_BATCH
            )
            z += load(residual + image * residual_image + of_residual, mask).to(tl.float32)
        dz = activation_gradient(z, dz, ACT, slope)
    if dresidual is not None:
        store(dresidual + image * x_image + at, dz, mask)
    if EVEN:
        total = tl.sum(dz, 0)
        weighted = tl.sum(dz * n, 0)
    else:
        total = tl.sum(tl.where(mask, dz, 0.0), 0)
        weighted = tl.sum(tl.where(mask, dz * n, 0.0), 0)
    to = sums + image * 2 * channels + channel
    tl.store(to, total, mask=there)
    tl.store(to + channels, weighted, mask=there)
    if not FROZEN:
        share = 1.0 / values  # where it is 1, a Python integer
        dz = dz - (total * share)[None, :] - n * (weighted * share)[None, :]
    store(dx + image * x_image + at, dz * (gain * rstd), mask)


@triton.jit
def _sums_kernel(
    x, grad, residual, mean, variance, weight, bias, dx, dresidual, partial,
    pixels, channels, parts, norm_stride,
    x_image, x_stride, grad_image, grad_stride, residual_image, residual_stride, eps, slope,
    ACT: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, ITERATIONS: tl.constexpr, PLANES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz n of each part, (images, parts, 2, channels). Writes dz where dresidual is given,
    and with frozen statistics, which need no sums, dx."""
    part = tl.program_id(0)
    block = tl.program_id(1)
    image = tl.program_id(2)
    channel = block * CB + tl.arange(0, CB)
    there = channel < channels
    row = tl.arange(0, BP)
    first = part * (BP * ITERATIONS)
    left = pixels - first
    center, rstd, gain, offset = _channel_values(
        mean + image * norm_stride, variance + image * norm_stride, weight, bias, 0, channel, channels, eps
    )
    x = tile_base(x, image, x_image, first, x_stride, PLANES)
    grad = tile_base(grad, image, grad_image, first, grad_stride, PLANES)
    if residual is not None:
        residual = tile_base(residual, image, residual_image, first, residual_stride, PLANES)
    if dresidual is not None:
        dresidual = tile_base(dresidual, image, x_image, first, x_stride, PLANES)
    if dx is not None:
        dx = tile_base(dx, image, x_image, first, x_stride, PLANES)
    total = tl.zeros((BP, CB), tl.float32)
    weighted = tl.zeros((BP, CB), tl.float32)
    for i in range(ITERATIONS):
        pixel = i * BP + row
        if EVEN:
            mask = None
        else:
            mask = (pixel < left)[:, None] & there[None, :]
        at = tile_offsets(pixel, channel, x_stride, PLANES)
        n = (load(x + at, mask).to(tl.float32) - center) * rstd
        dz = load(grad + tile_offsets(pixel, channel, grad_stride, PLANES), mask).to(tl.float32)
        if ACT != 0:
            z = n * gain + offset
            if residual is not None:
                of_residual = tile_offsets(pixel, channel, residual_stride, PLANES)
                z += load(residual + of_residual, mask).to(tl.float32)
            dz = activation_gradient(z, dz, ACT, slope)
        if dresidual is not None:
            store(dresidual + at, dz, mask)
        if dx is not None:
            store(dx + at, dz * (gain * rstd), mask)
        if not EVEN:
            dz = tl.where(mask, dz, 0.0)
            n = tl.where(mask, n, 0.0)
        total += dz
        weighted += dz * n
    to = partial + (image.to(tl.int64) * parts + part) * 2 * channels + channel
    tl.store(to, tl.sum(total, 0), mask=there)
    tl.store(to + channels, tl.sum(weighted, 0), mask=there)


@triton.jit
def _add_kernel(
    partial, out, rows, columns, group, groups, STEPS: tl.constexpr, BR: tl.constexpr, CB: tl.constexpr
):
    """Adds up groups of rows in float64: (instances, rows, columns) to (instances, groups, columns)."""
    g = tl.program_id(0)
    column = tl.program_id(1) * CB + tl.arange(0, CB)
    instance = tl.program_id(2).to(tl.int64)
    mine = tl.minimum(rows - g * group, group)
    row = tl.arange(0, BR)
    base = partial + (instance * rows + g * group) * columns
    total = tl.zeros((BR, CB), tl.float64)
    for i in range(STEPS):
        j = i * BR + row
        mask = (j < mine)[:, None] & (column < columns)[None, :]
        total += tl.load(base + j[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    to = out + (instance * groups + g) * columns + column
    tl.store(to, tl.sum(total, 0).to(tl.float32), mask=column < columns)


@triton.jit
def _finish_kernel(
    x, grad, residual, mean, variance, weight, bias, sums, dx,
    pixels, channels, values, norm_stride,
    x_image, x_stride, grad_image, grad_stride, residual_image, residual_stride, eps, slope,
    ACT: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, PLANES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (dz - mean(dz) - n mean(dz n))."""
    first = tl.program_id(0) * BP
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    image = tl.program_id(2)
    there = channel < channels
    row = tl.arange(0, BP)
    if EVEN:
        mask = None
    else:
        mask = (row < pixels - first)[:, None] & there[None, :]
    center, rstd, gain, offset = _channel_values(
        mean + image * norm_stride, variance + image * norm_stride, weight, bias, 0, channel, channels, eps
    )
    share = 1.0 / values  # where it is 1, a Python integer
    of_sums = sums + image * 2 * norm_stride + channel
    total = tl.load(of_sums, mask=there, other=0.0) * share
    weighted = tl.load(of_sums + channels, mask=there, other=0.0) * share
    at = tile_offsets(row, channel, x_stride, PLANES)
    n = (
        load(tile_base(x, image, x_image, first, x_stride, PLANES) + at, mask).to(tl.float32) - center
    ) * rstd
    of_grad = tile_base(grad, image, grad_image, first, grad_stride, PLANES)
    dz = load(of_grad + tile_offsets(row, channel, grad_stride, PLANES), mask).to(tl.float32)
    if ACT != 0:
        z = n * gain + offset
        if residual is not None:
            residual = tile_base(residual, image, residual_image, first, residual_stride, PLANES)
            z += load(residual + tile_offsets(row, channel, residual_stride, PLANES), mask).to(tl.float32)
        dz = activation_gradient(z, dz, ACT, slope)
    dz = dz - total[None, :] - n * weighted[None, :]
    store(tile_base(dx, image, x_image, first, x_stride, PLANES) + at, dz * (gain * rstd), mask)


def _arguments(
    x: Tensor,
    grad: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    planes: bool,
) -> dict[str, object]:
    of_x, of_grad = layout(x, planes), layout(grad, planes)
    of_residual = Layout(0, 0, 0) if residual is None else layout(residual, planes)
    return {
        "x": x,
        "grad": grad,
        "residual": residual,
        "mean": mean,
        "variance": variance,
        "weight": weight,
        "bias": bias,
        "x_image": of_x.image,
        "x_stride": of_x.stride,
        "grad_image": of_grad.image,
        "grad_stride": of_grad.stride,
        "residual_image": of_residual.image,
        "residual_stride": of_residual.stride,
        "eps": float(eps),
        "slope": float(slope),
        "channels": x.shape[1],
        "pixels": x.shape[2] * x.shape[3],
    }


def backward_launches(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    frozen: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    dx: Tensor,
    dresidual: Tensor | None,
    planes: bool,
) -> tuple[list[Launch], Tensor]:
    """The launches of a backward pass, and the sums (N or 1, 2, C) of dz and dz n that they leave.

    dx and dresidual are laid out as x.
    """
    images, channels, height, width = x.shape
    pixels = height * width
    over_batch = mean.dim() == 1
    instances = 1 if over_batch else images
    values = pixels * (images if over_batch else 1)
    code = activation_code(act)
    common = _arguments(x, grad, residual, mean, variance, weight, bias, eps, slope, planes)
    sums = torch.empty((instances, 2, channels), dtype=torch.float32, device=x.device)
    limit = RESIDENT if residual is None else RESIDENT // 2
    t = map_tiles(values, channels, x.element_size(), planes, limit)
    if t is not None:
        return [
            Launch(
                _map_kernel,
                (-(-channels // t.CB), instances),
                common | {"dx": dx, "dresidual": dresidual, "sums": sums, "values": values},
                {
                    "FROZEN": frozen,
                    "ACT": code,
                    "BP": t.BP,
                    "CB": t.CB,
                    "PLANES": planes,
                    "OVER_BATCH": over_batch and images > 1,
                    "EVEN": values == t.BP and channels % t.CB == 0,
                },
                t.num_warps,
            )
        ], sums
    t = tiles(pixels, channels, x.element_size(), planes, TILE)
    num_warps = min(2 * t.num_warps, 4)  # 16 elements a thread
    parts = -(-pixels // (t.BP * t.ITERATIONS))
    blocks = -(-channels // t.CB)
    tile = {"ACT": code, "BP": t.BP, "CB": t.CB, "PLANES": planes}
    norm_stride = 0 if over_batch else channels
    partial = torch.empty((images, parts, 2, channels), dtype=torch.float32, device=x.device)
    launches = [
        Launch(
            _sums_kernel,
            (parts, blocks, images),
            common
            | {
                "dx": dx if frozen else None,
                "dresidual": dresidual,
                "partial": partial,
                "parts": parts,
                "norm_stride": norm_stride,
            },
            tile
            | {
                "ITERATIONS": t.ITERATIONS,
                "EVEN": pixels % (t.BP * t.ITERATIONS) == 0 and channels % t.CB == 0,
            },
            num_warps,
        )
    ]
    launches += add_launches(partial.view(instances, -1, 2 * channels), sums)
    if not frozen:
        arguments = common | {"sums": sums, "dx": dx, "values": values, "norm_stride": norm_stride}
        if dresidual is not None:  # it is dz: neither grad nor the residual need be read again
            of_dz = layout(dresidual, planes)
            arguments |= {
                "grad": dresidual,
                "grad_image": of_dz.image,
                "grad_stride": of_dz.stride,
                "residual": None,
            }
            tile = tile | {"ACT": 0}
        even = pixels % t.BP == 0 and channels % t.CB == 0
        grid = (-(-pixels // t.BP), blocks, images)
        launches.append(Launch(_finish_kernel, grid, arguments, tile | {"EVEN": even}, num_warps))
    return launches, sums


def add_launches(partial: Tensor, out: Tensor) -> list[Launch]:
    """Adds up rows: (instances, rows, columns) into ``out``, (instances, ...); twice where there are many."""
    instances, rows, columns = partial.shape
    cb = min(power_of_2(columns), 32)
    blocks = -(-columns // cb)
    launches = []
    while True:
        group = rows if rows <= GROUP else max(GROUP, power_of_2(-(-rows // GROUP)))
        groups = -(-rows // group)
        br = min(power_of_2(group), 64)
        to = out if groups == 1 else partial.new_empty((instances, groups, columns))
        launches.append(
            Launch(
                _add_kernel,
                (groups, blocks, instances),
                {
                    "partial": partial,
                    "out": to,
                    "rows": rows,
                    "columns": columns,
                    "group": group,
                    "groups": groups,
                },
                {"STEPS": -(-group // br), "BR": br, "CB": cb},
            )
        )
        if groups == 1:
            return launches
        partial, rows = to, groups


def _dense(t: Tensor) -> Tensor:
    if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous()


def _like(t: Tensor, planes: bool) -> Tensor:
    return t.contiguous(memory_format=torch.contiguous_format if planes else torch.channels_last)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    over_batch: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``p2pfast::norm_act`` on the GPU; arguments are not checked again."""
    x = _dense(x.detach())
    planes = x.is_contiguous()
    residual = None if residual is None else _like(residual.detach(), planes)
    y, used_mean, used_variance = normalise(
        x, weight, bias, mean, variance, over_batch, eps, act, slope, residual, planes
    )
    # The results of an operator share no memory with its arguments or with each other: PyTorch raises.
    return y, used_mean.clone(), used_variance.clone()


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    frozen: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    of_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``p2pfast::norm_act_backward`` on the GPU; arguments are not checked again."""
    check_tensor("x", x)
    x = _dense(x.detach())
    planes = x.is_contiguous()
    grad = _like(grad.detach().to(x.dtype), planes)
    residual = None if residual is None or act == "none" else _like(residual.detach(), planes)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if of_residual else None
    mean, variance = mean.detach().float().contiguous(), variance.detach().float().contiguous()
    with on_device(x):
        launches, sums = backward_launches(
            grad, x, floats(weight), floats(bias), mean, variance, frozen, eps, act, slope, residual, dx,
            dresidual, planes,
        )  # fmt: skip
        for launch in launches:
            launch.run()
    dbias, dweight = sums.sum(0) if len(sums) > 1 else sums[0].clone()
    return dx, dweight.clone(), dbias.clone(), x.new_empty(0) if dresidual is None else dresidual


def shipped() -> list[Shipped]:
    """What the networks' sizes lead to, for ``p2pfast.ops.gpu.compile``."""
    found: list[Shipped] = []
    for dtype, planes, size, over_batch, frozen, act, added in (
        (torch.bfloat16, False, (1, 64, 512, 1024), False, False, "relu", False),
        (torch.bfloat16, False, (1, 64, 512, 1024), False, False, "relu", True),
        (torch.float32, False, (4, 64, 512, 1024), True, False, "leaky_relu", False),
        (torch.float32, False, (1, 64, 512, 1024), False, True, "silu", True),
        (torch.bfloat16, True, (1, 64, 511, 511), False, False, "relu", True),
        (torch.float32, True, (1, 64, 512, 512), False, False, "tanh", False),
        (torch.bfloat16, False, (1, 1024, 32, 32), False, False, "relu", False),
        (torch.bfloat16, False, (1, 256, 16, 64), False, False, "relu", True),
        (torch.float32, False, (1, 256, 64, 64), False, False, "leaky_relu", False),
        (torch.float16, True, (1, 256, 128, 128), False, False, "relu", False),
        (torch.float32, True, (1, 256, 64, 64), False, False, "relu", True),
        (torch.bfloat16, True, (16, 512, 4, 4), True, False, "leaky_relu", False),
    ):
        memory_format = torch.contiguous_format if planes else torch.channels_last
        x = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        norm = torch.empty(size[1] if over_batch else size[:2], device="meta")
        weight = torch.empty(size[1], device="meta")
        residual = x if added else None
        launches, _ = backward_launches(
            x, x, weight, weight, norm, norm, frozen, 1e-5, act, 0.2, residual, x, residual, planes
        )
        kind = f"{act} {str(dtype)[6:]} {'NCHW' if planes else 'NHWC'} {'x'.join(map(str, size))}"
        for launch in launches:
            name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            known = {"map": "backward, whole map", "sums": "backward, sums", "finish": "backward, dx"}
            if name in known:
                extras = f"{', residual' if added else ''}{', frozen' if frozen else ''}"
                found.append(launch.shipped(f"{known[name]}{extras} {kind}"))
    added_up = torch.empty((1, 2048, 128), device="meta")
    for i, launch in enumerate(add_launches(added_up, torch.empty((1, 2, 64), device="meta"))):
        found.append(launch.shipped(f"sums of 2048 parts, pass {i + 1}"))
    return found
