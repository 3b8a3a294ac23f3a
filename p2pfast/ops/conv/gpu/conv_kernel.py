"""The implicit matrix product behind every convolution, strided or transposed, in Triton.

Pixels of one image are rows of the product, output channels its columns, and taps times input channels its
depth, in one loop (a loop of one trip inside a loop over taps would lose its asynchronous copies). Layouts of
weights and the numbering of phases are those of ``pack.py``; the mathematics is in this operator's README.
"""

from __future__ import annotations

import triton
import triton.language as tl

from p2pfast.ops.gpu.device import LEAKY_RELU, RELU, activate, dot, padded_index, rounded, tile_statistics


@triton.jit
def activate_on_load(v, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """``activate`` with one instruction less for each value where a maximum (NaN stays NaN) does it."""
    if ACT == RELU:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == LEAKY_RELU and SLOPE >= 0 and SLOPE <= 1:
        v = tl.maximum(v, v * SLOPE, propagate_nan=tl.PropagateNan.ALL)
    else:
        v = activate(v, ACT, SLOPE)
    return v


@triton.jit
def steps_of(taps, C: tl.constexpr, FLAT: tl.constexpr, BK: tl.constexpr):
    """Steps of the loop over one source."""
    if FLAT:
        return tl.cdiv(taps * C, BK)
    else:
        return taps * ((C + BK - 1) // BK)


@triton.jit
def products(
    acc,
    x,
    scale,
    shift,
    w,
    top,
    left,
    height,
    width,
    row_stride,
    taps,
    kernel_w,
    begin,
    end,
    column,
    first_column,
    depth0,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    FLAT: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """acc (rows, BN) plus the products of one source's taps with their weights.

    Args:
        x: pointer to the image; scale, shift: to its first channel, or None.
        w: (1, BN) pointers to the weights of this source's first tap; with DESCRIPTOR, a descriptor of tiles
            (BN, BK) of all weights, in which they begin at (first_column, depth0).
        top, left: (rows,) input position under the first tap of each row, before padding.
        taps, kernel_w: taps of the window and how many of them a row of it has.
        begin, end: the steps to do, of ``steps_of``.
        column: (BN,) numbers of columns, of which those below COLUMNS exist.
        FLAT: a step takes BK of taps x channels instead of BK channels of one tap.
    """
    k = tl.arange(0, BK)
    # Channels of a tap are padded to a multiple of 16 in the weights (pack.py).
    CP: tl.constexpr = (C + 15) // 16 * 16
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    RAGGED: tl.constexpr = FLAT or C % BK != 0
    # Beyond a tap's channels a descriptor would read the next tap's.
    tl.static_assert(not (DESCRIPTOR and RAGGED))
    for step in tl.range(begin, end):
        if FLAT:
            depth = step * BK + k
            tap = depth // C
            c = depth % C
            y = top[:, None] + (tap // kernel_w)[None, :]
            z = left[:, None] + (tap % kernel_w)[None, :]
            exists = depth < taps * C
        else:
            tap = step // BLOCKS
            c = (step % BLOCKS) * BK + k
            depth = tap * CP + c
            y = (top + tap // kernel_w)[:, None]
            z = (left + tap % kernel_w)[:, None]
            exists = c < C
        if PAD == "zeros":
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
            if RAGGED:
                inside = inside & exists[None, :]
        y = padded_index(y, height, PAD)
        z = padded_index(z, width, PAD)
        if WIDE:
            y = y.to(tl.int64)
        source = x + (y * row_stride + z * PIXEL) + c[None, :]
        if PAD == "zeros":
            a = tl.load(source, mask=inside, other=0.0)
        elif RAGGED:
            a = tl.load(source, mask=exists[None, :], other=0.0)
        else:
            a = tl.load(source)
        if scale is not None or ACT != 0:
            value = a.to(tl.float32)
            if scale is not None:
                if RAGGED:
                    s = tl.load(scale + c, mask=exists, other=0.0)
                    t = tl.load(shift + c, mask=exists, other=0.0)
                else:
                    s = tl.load(scale + c)
                    t = tl.load(shift + c)
                value = value * s[None, :] + t[None, :]
            value = activate_on_load(value, ACT, SLOPE)
            if PAD == "zeros":
                value = tl.where(inside, value, 0.0)  # padding comes after the activation
            a = rounded(value, x.dtype.element_ty)
        if DESCRIPTOR:
            # Columns that do not exist are zeros.
            b = tl.trans(w.load([first_column, depth0 + tap * CP + (step % BLOCKS) * BK]))
        else:
            weights = w + depth[:, None]
            if COLUMNS % BN != 0:
                if RAGGED:
                    b = tl.load(weights, mask=exists[:, None] & (column < COLUMNS)[None, :], other=0.0)
                else:
                    b = tl.load(weights, mask=(column < COLUMNS)[None, :], other=0.0)
            elif RAGGED:
                b = tl.load(weights, mask=exists[:, None], other=0.0)
            else:
                b = tl.load(weights)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def weights_of(taps, C: tl.constexpr, FLAT: tl.constexpr):
    """Weights of a row of the packed matrix that belong to one source."""
    if FLAT:
        return (taps * C + 15) // 16 * 16
    else:
        return taps * ((C + 15) // 16 * 16)


@triton.jit
def phase_size(
    Q: tl.constexpr,
    out_height,
    out_width,
    C0: tl.constexpr,
    FLAT0: tl.constexpr,
    C1: tl.constexpr,
    FLAT1: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    BM: tl.constexpr,
):
    """Tiles of a phase of a transposed convolution, and weights of a row of the packed matrix."""
    RY: tl.constexpr = Q // STRIDE
    RX: tl.constexpr = Q % STRIDE
    TAPS: tl.constexpr = ((KH - RY + STRIDE - 1) // STRIDE) * ((KW - RX + STRIDE - 1) // STRIDE)
    AT_Y: tl.constexpr = (RY - PAD_TOP % STRIDE + STRIDE) % STRIDE
    AT_X: tl.constexpr = (RX - PAD_LEFT % STRIDE + STRIDE) % STRIDE
    rows = (out_height - AT_Y + STRIDE - 1) // STRIDE
    cols = (out_width - AT_X + STRIDE - 1) // STRIDE
    return tl.cdiv(rows * cols, BM), weights_of(TAPS, C0, FLAT0) + weights_of(TAPS, C1, FLAT1)


@triton.jit
def conv_kernel(
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
    work,
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
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    PAD: tl.constexpr,
    PHASES: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    PASS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """One tile of BM pixels and BN channels; the grid is (tiles x column blocks, phases x splits, images).

    PHASES: "none" for a convolution; "grid" and "columns" for a transposed one, whose sub-pixel phases are
    either the second axis of the grid or columns of the product, over the union of their windows.
    PASS: "whole"; or, where few tiles would leave a device idle, "split": each of SPLITS programs stores its
    share of a tile's depth in ``work``, and "merge": their sum, in order, and what follows it.
    DESCRIPTOR: ``w`` describes the packed weights' tiles instead of pointing to them.
    FULL: every tile is full and every column of every row is an output. WIDE: an image spans 2^31 elements.
    """
    image = tl.program_id(2).to(tl.int64)
    COLUMNS: tl.constexpr = COUT * STRIDE * STRIDE if PHASES == "columns" else COUT
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BN - 1) // BN
    tile = tl.program_id(0) // COLUMN_BLOCKS
    first_column = (tl.program_id(0) % COLUMN_BLOCKS) * BN
    column = first_column + tl.arange(0, BN)

    part = tile
    depth0 = 0
    # How rows of the product map to input and output: in = row * IN_STEP - pad, out = row * OUT_STEP + at.
    IN_STEP: tl.constexpr = STRIDE if PHASES == "none" else 1
    OUT_STEP: tl.constexpr = 1 if PHASES == "none" else STRIDE
    if PHASES == "grid":
        phase = tl.program_id(1) // SPLITS if PASS == "split" else tl.program_id(1)
        ry = phase // STRIDE
        rx = phase % STRIDE
        taps_h = (KH - ry + STRIDE - 1) // STRIDE
        taps_w = (KW - rx + STRIDE - 1) // STRIDE
        # Neither % nor // may see a negative operand: they truncate.
        at_y = (ry - PAD_TOP % STRIDE + STRIDE) % STRIDE
        at_x = (rx - PAD_LEFT % STRIDE + STRIDE) % STRIDE
        pad_top = taps_h - 1 - (at_y + PAD_TOP - ry) // STRIDE
        pad_left = taps_w - 1 - (at_x + PAD_LEFT - rx) // STRIDE
        rows = (out_height - at_y + STRIDE - 1) // STRIDE
        cols = (out_width - at_x + STRIDE - 1) // STRIDE
        if tile * BM >= rows * cols:
            return
        for q in tl.static_range(STRIDE * STRIDE - 1):
            tiles, depth = phase_size(
                q, out_height, out_width, C0, FLAT0, C1, FLAT1, KH, KW, STRIDE, PAD_TOP, PAD_LEFT, BM
            )
            part += tl.where(q < phase, tiles, 0)
            depth0 += tl.where(q < phase, depth, 0)
    else:
        taps_h = KH
        taps_w = KW
        pad_top = PAD_TOP
        pad_left = PAD_LEFT
        at_y = 0
        at_x = 0
        rows = tl.cdiv(out_height, OUT_STEP)
        cols = tl.cdiv(out_width, OUT_STEP)

    pixels = rows * cols
    m = tile * BM + tl.arange(0, BM)
    # Rows past the last pixel repeat it: they read what exists, and are neither counted nor stored.
    pixel = tl.minimum(m, pixels - 1)
    y = pixel // cols
    z = pixel % cols
    top = y * IN_STEP - pad_top
    left = z * IN_STEP - pad_left

    acc = tl.zeros((BM, BN), tl.float32)
    if PASS != "whole":
        split = tl.program_id(1) % SPLITS if PASS == "split" else 0
        own = tl.program_id(1) // SPLITS if PASS == "split" else tl.program_id(1)
        phases = STRIDE * STRIDE if PHASES == "grid" else 1
        block = (image * phases + own) * tl.num_programs(0) + tl.program_id(0)
        inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        share_of = work + (block * SPLITS + split) * (BM * BN)
    if PASS == "merge":
        # One share after the other: all their loads at once would spill registers.
        for _ in range(SPLITS):
            acc += tl.load(share_of + inner)
            share_of += BM * BN
    else:
        steps0 = steps_of(taps_h * taps_w, C0, FLAT0, BK)
        begin0 = 0
        end0 = steps0
        begin1 = 0
        end1 = steps_of(taps_h * taps_w, C1, FLAT1, BK) if C1 > 0 else 0
        if PASS == "split":
            share = tl.cdiv(steps0 + end1, SPLITS)
            begin = split * share
            end = begin + share
            begin0 = tl.minimum(begin, steps0)
            end0 = tl.minimum(end, steps0)
            begin1 = tl.minimum(tl.maximum(begin - steps0, 0), end1)
            end1 = tl.minimum(tl.maximum(end - steps0, 0), end1)
        depth1 = depth0 + weights_of(taps_h * taps_w, C0, FLAT0)
        if DESCRIPTOR:
            weights0 = w
            weights1 = w
        else:
            weights0 = w + (column.to(tl.int64) * DEPTH + depth0)[None, :]
            weights1 = weights0 + weights_of(taps_h * taps_w, C0, FLAT0)
        acc = products(
            acc,
            x0 + image * x0_image,
            scale0 + image * norm0_image if scale0 is not None else None,
            shift0 + image * norm0_image if shift0 is not None else None,
            weights0,
            top,
            left,
            height,
            width,
            x0_row,
            taps_h * taps_w,
            taps_w,
            begin0,
            end0,
            column,
            first_column,
            depth0,
            X0_PIXEL,
            C0,
            FLAT0,
            ACT0,
            SLOPE0,
            PAD,
            COLUMNS,
            BN,
            BK,
            WIDE,
            PRECISION,
            DESCRIPTOR,
        )
        if C1 > 0:
            acc = products(
                acc,
                x1 + image * x1_image,
                scale1 + image * norm1_image if scale1 is not None else None,
                shift1 + image * norm1_image if shift1 is not None else None,
                weights1,
                top,
                left,
                height,
                width,
                x1_row,
                taps_h * taps_w,
                taps_w,
                begin1,
                end1,
                column,
                first_column,
                depth1,
                X1_PIXEL,
                C1,
                FLAT1,
                ACT1,
                SLOPE1,
                PAD,
                COLUMNS,
                BN,
                BK,
                WIDE,
                PRECISION,
                DESCRIPTOR,
            )
    if PASS == "split":
        tl.store(share_of + inner, acc)
        return

    channel = column % COUT
    exists = column < COLUMNS
    if factor is not None:
        acc *= tl.load(factor + channel, mask=exists, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]

    out_y = (y * OUT_STEP + at_y)[:, None]
    out_z = (z * OUT_STEP + at_x)[:, None]
    valid = (m < pixels)[:, None]
    if PHASES == "columns":
        out_y += (column // (COUT * STRIDE))[None, :]
        out_z += (column // COUT % STRIDE)[None, :]
        valid = valid & (out_y < out_height) & (out_z < out_width)

    if partial is not None:
        if FULL:
            values = tl.full((BN,), BM, tl.float32)
            mean, m2 = tile_statistics(acc, None, BM)
        elif PHASES == "columns":
            values = tl.sum(tl.broadcast_to(valid, (BM, BN)).to(tl.float32), 0)
            mean = tl.sum(tl.where(valid, acc, 0.0), 0) / tl.maximum(values, 1.0)
            away = tl.where(valid, acc - mean[None, :], 0.0)
            m2 = tl.sum(away * away, 0)
        else:
            inside = tl.minimum(pixels - tile * BM, BM).to(tl.float32)
            values = tl.zeros((BN,), tl.float32) + inside
            mean, m2 = tile_statistics(acc, m < pixels, inside)
        if PHASES == "columns":
            where = part * (STRIDE * STRIDE) + column // COUT
        else:
            where = part + tl.zeros((BN,), tl.int32)
        target = partial + image * parts * (2 * COUT) + where * (2 * COUT) + channel
        tl.store(target, mean, mask=exists)
        tl.store(target + COUT, m2, mask=exists)
        # Every image has the same parts: the first one tells their sizes.
        if tl.program_id(2) == 0:
            tl.store(count + where, values, mask=exists & (channel == 0))

    if WIDE:
        out_y = out_y.to(tl.int64)
    if residual is not None:
        place = residual + image * residual_image + out_y * residual_row + out_z * RESIDUAL_PIXEL
        added = tl.load(place + channel[None, :], mask=valid & exists[None, :], other=0.0).to(tl.float32)
        if residual_scale is not None:
            at = image * residual_norm_image + channel
            s = tl.load(residual_scale + at, mask=exists, other=0.0)
            t = tl.load(residual_shift + at, mask=exists, other=0.0)
            added = added * s[None, :] + t[None, :]
        acc += activate(added, RESIDUAL_ACT, RESIDUAL_SLOPE)
    acc = activate(acc, ACT, SLOPE)
    # Offsets first: as pointers all along they would take twice the registers.
    place = out + image * out_image + (out_y * out_row + out_z * OUT_PIXEL + channel[None, :])
    if FULL and COLUMNS % BN == 0:
        tl.store(place, rounded(acc, out.dtype.element_ty))
    elif FULL:
        tl.store(place, rounded(acc, out.dtype.element_ty), mask=exists[None, :])
    else:
        tl.store(place, rounded(acc, out.dtype.element_ty), mask=valid & exists[None, :])
