// float16 storage, converted on every instruction-set level.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

struct Half {
  uint16_t bits;
};

// Exact for every float16: the exponent is rebased by a multiplication, which also takes care of
// subnormal numbers.
P2PFAST_INLINE Vec half_to_float(VecH bits) {
  const VecW h = __builtin_convertvector(bits, VecW);
  const Vec finite = (Vec)((h & 0x7fffu) << 13) * 0x1p112f;
  const VecW special = (VecW)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vec)((VecW)finite | special | ((h & 0x8000u) << 16));
}

// Rounds to nearest even, to infinity from 65520 on; a NaN stays a (quiet) NaN. Below float16's smallest
// normal number an addition does the rounding: 0.5's unit in the last place is float16's smallest step.
P2PFAST_INLINE VecH float_to_half(Vec v) {
  const VecW w = (VecW)v, magnitude = w & 0x7fffffffu;
  const VecW tiny = (VecW)((Vec)magnitude + 0.5f) - 0x3f000000u;
  const VecW normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecW is_tiny = (VecW)(magnitude < 0x38800000u), is_large = (VecW)(magnitude >= 0x477ff000u);
  const VecW is_nan = (VecW)(magnitude > 0x7f800000u);
  VecW r = (tiny & is_tiny) | (normal & ~is_tiny);
  r = (r & ~is_large) | (0x7c00u & is_large) | (0x0200u & is_nan);
  return __builtin_convertvector(r | ((w >> 16) & 0x8000u), VecH);
}

P2PFAST_INLINE Vec load(const Half* p) {
  VecH bits;
  std::memcpy(&bits, p, sizeof(bits));
  return half_to_float(bits);
}

P2PFAST_INLINE void store(Half* p, Vec v) {
  const VecH bits = float_to_half(v);
  std::memcpy(p, &bits, sizeof(bits));
}

}  // namespace p2pfast::P2PFAST_LEVEL
