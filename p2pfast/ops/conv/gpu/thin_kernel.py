"""Few output channels in Triton: rows of the output and horizontal taps become columns of the product.

Three channels would leave most of a tile of columns empty. The product instead gives, for each input column,
what each horizontal tap makes of it for several output rows; an output is the sum over taps of neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from p2pfast.ops.conv.gpu.conv_kernel import products, steps_of, weights_of
from p2pfast.ops.gpu.device import activate, store


@triton.jit
def thin_kernel(
    x0,
    scale0,
    shift0,
    x1,
    scale1,
    shift1,
    w,
    factor,
    bias,
    residual,
    residual_scale,
    residual_shift,
    out,
    partial,
    count,
    height,
    width,
    out_height,
    out_width,
    x0_image,
    x0_row,
    norm0_image,
    x1_image,
    x1_row,
    norm1_image,
    residual_image,
    residual_row,
    residual_norm_image,
    out_image,
    out_row,
    parts,
    X0_PIXEL: tl.constexpr,
    C0: tl.constexpr,
    FLAT0: tl.constexpr,
    ACT0: tl.constexpr,
    SLOPE0: tl.constexpr,
    X1_PIXEL: tl.constexpr,
    C1: tl.constexpr,
    FLAT1: tl.constexpr,
    ACT1: tl.constexpr,
    SLOPE1: tl.constexpr,
    RESIDUAL_PIXEL: tl.constexpr,
    RESIDUAL_ACT: tl.constexpr,
    RESIDUAL_SLOPE: tl.constexpr,
    OUT_PIXEL: tl.constexpr,
    COUT: tl.constexpr,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KW: tl.constexpr,
    KWP: tl.constexpr,
    CP: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    PAD: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """ROWS rows of BM - KW + 1 pixels; the grid is (blocks of columns, of rows, images).

    Columns of the product are (row, tap, channel) of sizes ROWS, KWP >= KW and CP >= COUT; WINDOW = ROWS + Kh
    - 1 input rows go in. PAD is never "none": what the last tiles read past the image has to be bounded.
    """
    image = tl.program_id(2).to(tl.int64)
    p = tl.arange(0, BM)
    first = tl.program_id(0) * (BM - KW + 1)
    row = tl.program_id(1) * ROWS
    top = tl.zeros((1,), tl.int32) + row - PAD_TOP
    left = first + p - PAD_LEFT
    BN: tl.constexpr = ROWS * KWP * CP
    column = tl.arange(0, BN)
    weights = w + (column * DEPTH)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    acc = products(
        acc,
        x0 + image * x0_image,
        scale0 + image * norm0_image if scale0 is not None else None,
        shift0 + image * norm0_image if shift0 is not None else None,
        weights,
        top,
        left,
        height,
        width,
        x0_row,
        WINDOW,
        1,
        0,
        steps_of(WINDOW, C0, FLAT0, BK),
        column,
        0,
        0,
        X0_PIXEL,
        C0,
        FLAT0,
        ACT0,
        SLOPE0,
        PAD,
        BN,
        BN,
        BK,
        WIDE,
        PRECISION,
        False,
    )
    if C1 > 0:
        acc = products(
            acc,
            x1 + image * x1_image,
            scale1 + image * norm1_image if scale1 is not None else None,
            shift1 + image * norm1_image if shift1 is not None else None,
            weights + weights_of(WINDOW, C0, FLAT0),
            top,
            left,
            height,
            width,
            x1_row,
            WINDOW,
            1,
            0,
            steps_of(WINDOW, C1, FLAT1, BK),
            column,
            0,
            0,
            X1_PIXEL,
            C1,
            FLAT1,
            ACT1,
            SLOPE1,
            PAD,
            BN,
            BN,
            BK,
            WIDE,
            PRECISION,
            False,
        )
    split = tl.permute(tl.reshape(acc, (BM, ROWS, KWP, CP)), (1, 3, 2, 0))
    tap = tl.arange(0, KWP)
    source = tl.minimum(p[None, :] + tap[:, None], BM - 1)[None, None, :, :]
    moved = tl.gather(split, tl.broadcast_to(source, (ROWS, CP, KWP, BM)), 3)
    y = tl.sum(tl.where((tap < KW)[None, None, :, None], moved, 0.0), 2)

    channel = tl.arange(0, CP)[None, :, None]
    out_y = (row + tl.arange(0, ROWS))[:, None, None]
    out_z = (first + p)[None, None, :]
    mask = (channel < COUT) & (out_y < out_height) & (out_z < out_width) & (p < BM - KW + 1)[None, None, :]
    if factor is not None:
        y *= tl.load(factor + channel, mask=channel < COUT, other=0.0)
    if bias is not None:
        y += tl.load(bias + channel, mask=channel < COUT, other=0.0).to(tl.float32)
    if partial is not None:
        # Two passes over the tile in registers, as in conv_kernel.
        rows = tl.minimum(out_height - row, ROWS)
        cols = tl.minimum(out_width - first, BM - KW + 1)
        values = (rows * cols).to(tl.float32)
        mean = tl.sum(tl.sum(tl.where(mask, y, 0.0), 2), 0) / values
        away = tl.where(mask, y - mean[None, :, None], 0.0)
        m2 = tl.sum(tl.sum(away * away, 2), 0)
        part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        c = tl.arange(0, CP)
        target = partial + image * parts * (2 * COUT) + part * (2 * COUT) + c
        tl.store(target, mean, mask=c < COUT)
        tl.store(target + COUT, m2, mask=c < COUT)
        if tl.program_id(2) == 0:
            tl.store(count + part, values)
    if WIDE:
        out_y = out_y.to(tl.int64)
    if residual is not None:
        place = residual + image * residual_image + out_y * residual_row + out_z * RESIDUAL_PIXEL + channel
        added = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if residual_scale is not None:
            at = image * residual_norm_image + channel
            s = tl.load(residual_scale + at, mask=channel < COUT, other=0.0)
            t = tl.load(residual_shift + at, mask=channel < COUT, other=0.0)
            added = added * s + t
        y += activate(added, RESIDUAL_ACT, RESIDUAL_SLOPE)
    y = activate(y, ACT, SLOPE)
    place = out + image * out_image + out_y * out_row + out_z * OUT_PIXEL + channel
    store(place, y, mask)
