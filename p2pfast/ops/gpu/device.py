"""Functions called inside Triton kernels. They compute in float32 and work in the interpreter too.

Importing this imports triton: kernels' modules are imported when an operator first runs on a GPU.
"""

from __future__ import annotations

from p2pfast.ops.conv.activation import ACTIVATIONS
from p2pfast.ops.gpu.support import interpreted, require_triton

require_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

INTERPRETED = tl.constexpr(interpreted())

NONE = tl.constexpr(ACTIVATIONS.index("none"))
RELU = tl.constexpr(ACTIVATIONS.index("relu"))
LEAKY_RELU = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
TANH = tl.constexpr(ACTIVATIONS.index("tanh"))
SIGMOID = tl.constexpr(ACTIVATIONS.index("sigmoid"))
ELU = tl.constexpr(ACTIVATIONS.index("elu"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """float32 ``v`` in DTYPE, to nearest even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        kept = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
        return kept.to(DTYPE)
    else:
        return v.to(DTYPE)


@triton.jit
def store(pointers, v, mask):
    """Stores float32 ``v`` in the type of what ``pointers`` point to; ``mask`` may be None."""
    tl.store(pointers, rounded(v, pointers.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = "tf32"):
    """``acc + a @ b``; PRECISION is that of float32 operands ("tf32", "tf32x3" or "ieee"). The interpreter's
    product of bfloat16 operands is wrong, and is made in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def inverse_root(v):
    """1 / sqrt(v), each step rounded to nearest: a GPU's plain ones are off by a few units in the last place,
    which every value of a channel would be multiplied by."""
    return tl.div_rn(tl.full(v.shape, 1.0, tl.float32), tl.sqrt_rn(v))


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def tanh(v):
    """Of magnitudes below 1/4 by its series: 1 - exp(-2v) would lose digits there."""
    e = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    s = v * v
    near = v + v * s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(s < 0.0625, near, tl.where(v < 0, -far, far))


@triton.jit
def expm1(v):
    near = v * (
        1 + v * (1.0 / 2 + v * (1.0 / 6 + v * (1.0 / 24 + v * (1.0 / 120 + v * (1.0 / 720 + v / 5040)))))
    )
    return tl.where(tl.abs(v) < 0.25, near, tl.exp(v) - 1.0)


@triton.jit
def activate(v, ACT: tl.constexpr, slope):
    """An activation by its code; ``slope`` is leaky_relu's negative slope or elu's alpha. NaN stays NaN."""
    if ACT == RELU:
        v = tl.where(v < 0, 0.0, v)
    elif ACT == LEAKY_RELU:
        v = tl.where(v < 0, v * slope, v)
    elif ACT == TANH:
        v = tanh(v)
    elif ACT == SIGMOID:
        v = sigmoid(v)
    elif ACT == ELU:
        v = tl.where(v > 0, v, slope * expm1(v))
    elif ACT == SILU:
        v = v / (1.0 + tl.exp(-v))
    elif ACT == GELU:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def activation_gradient(v, grad, ACT: tl.constexpr, slope):
    """The gradient before an activation from the one after it; ``v`` is what the activation was given. At
    zero it is PyTorch's: 0 for relu, the slope for leaky_relu."""
    if ACT == RELU:
        grad = tl.where(v <= 0, 0.0, grad)
    elif ACT == LEAKY_RELU:
        grad = tl.where(v > 0, grad, grad * slope)
    elif ACT == TANH:
        t = tanh(v)
        grad = grad * (1.0 - t * t)
    elif ACT == SIGMOID:
        s = sigmoid(v)
        grad = grad * s * (1.0 - s)
    elif ACT == ELU:
        grad = tl.where(v > 0, grad, grad * slope * tl.exp(v))
    elif ACT == SILU:
        s = sigmoid(v)
        grad = grad * s * (1.0 + v * (1.0 - s))
    elif ACT == GELU:
        cumulative = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        grad = grad * (cumulative + v * 0.3989422804014327 * tl.exp(-0.5 * v * v))
    return grad


@triton.jit
def chan(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Count, mean and M2 of two groups together (Chan, Golub, LeVeque 1983), for tl.reduce and for loops."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / tl.maximum(count, 1), 0.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def tile_statistics(values, valid, count):
    """Mean and M2 of a tile's columns, in two passes over its registers.

    values: (rows, columns) float32; valid: (rows,), the rows that count, or None for all; count: how many.
    """
    if valid is None:
        mean = tl.sum(values, 0) / count
        d = values - mean[None, :]
    else:
        mean = tl.sum(tl.where(valid[:, None], values, 0.0), 0) / count
        d = tl.where(valid[:, None], values - mean[None, :], 0.0)
    return mean, tl.sum(d * d, 0)


@triton.jit
def reflected(i, n):
    """The index that reflect padding reads for ``i`` in [-(n - 1), 2 (n - 1)] of ``n``."""
    i = tl.where(i < 0, -i, i)
    return tl.where(i >= n, 2 * n - 2 - i, i)


@triton.jit
def clamped(i, n):
    """The index that replicate padding reads."""
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def padded_index(i, size, PAD: tl.constexpr):
    """Where padding reads. An index too far out for one reflection belongs to no output: any pixel does."""
    if PAD == "reflect":
        i = tl.maximum(size - 1 - tl.abs(size - 1 - tl.abs(i)), 0)
    elif PAD == "replicate":
        i = clamped(i, size)
    return i
