// Elementary functions on vectors, accurate to a few units in the last place.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

// exp(x) for x in [-87, 88]; clamped outside. Cody-Waite reduction and a degree-6 polynomial.
P2PFAST_INLINE Vec exp_vec(Vec x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const VecI n = (VecI)shifted - 0x4b400000;
  const Vec k = shifted - 12582912.0f;
  const Vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec e = p * r * r + r + 1.0f;
  return (Vec)((VecI)e + (n << 23));
}

// Odd polynomial near zero, 1 - 2 / (exp(2x) + 1) elsewhere. NaN stays NaN.
P2PFAST_INLINE Vec tanh_vec(Vec x) {
  const Vec a = x < 0.0f ? -x : x;
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec small = x + x * z * p;
  const Vec t = 1.0f - 2.0f / (exp_vec(2.0f * a) + 1.0f);
  const Vec large = x < 0.0f ? -t : t;
  const Vec r = a < 0.625f ? small : large;
  return x != x ? x : r;
}

P2PFAST_INLINE Vec sigmoid_vec(Vec x) {
  const Vec r = 1.0f / (1.0f + exp_vec(-x));
  return x != x ? x : r;
}

}  // namespace p2pfast::P2PFAST_LEVEL
