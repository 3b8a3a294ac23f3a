// Squares of kLanes x kLanes values turned in registers.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

// Lane l of the result is position f(l) of a and b side by side.
template <class F, int... kLane>
P2PFAST_INLINE Vec shuffle(Vec a, Vec b, F f, std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, f(kLane)...);
#else
  return __builtin_shuffle(a, b, (VecI){f(kLane)...});
#endif
}
template <class F>
P2PFAST_INLINE Vec shuffle(Vec a, Vec b, F f) {
  return shuffle(a, b, f, std::make_integer_sequence<int, kLanes>{});
}

// Exchanges the off-diagonal squares of kSize x kSize in every square of twice that.
template <int kSize>
P2PFAST_INLINE void exchange(Vec (&v)[kLanes]) {
  constexpr auto low = [](int l) constexpr { return l & kSize ? kLanes + l - kSize : l; };
  constexpr auto high = [](int l) constexpr { return l & kSize ? kLanes + l : l + kSize; };
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSize) continue;
    const Vec a = v[i], b = v[i + kSize];
    v[i] = shuffle(a, b, low);
    v[i + kSize] = shuffle(a, b, high);
  }
}

// Lane j of v[i] and lane i of v[j] change places. Every shuffle is one instruction.
P2PFAST_INLINE void transpose(Vec (&v)[kLanes]) {
  constexpr auto low = [](int l) constexpr { return (l & ~3) + (l & 3) / 2 + (l & 1) * kLanes; };
  constexpr auto high = [](int l) constexpr { return (l & ~3) + 2 + (l & 3) / 2 + (l & 1) * kLanes; };
  constexpr auto begins = [](int l) constexpr { return (l & ~3) + (l & 1) + (l & 2) / 2 * kLanes; };
  constexpr auto ends = [](int l) constexpr { return (l & ~3) + 2 + (l & 1) + (l & 2) / 2 * (kLanes); };
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const Vec a = shuffle(v[i], v[i + 1], low), b = shuffle(v[i], v[i + 1], high);
    const Vec c = shuffle(v[i + 2], v[i + 3], low), d = shuffle(v[i + 2], v[i + 3], high);
    v[i] = shuffle(a, c, begins);
    v[i + 1] = shuffle(a, c, ends);
    v[i + 2] = shuffle(b, d, begins);
    v[i + 3] = shuffle(b, d, ends);
  }
  if constexpr (kLanes >= 8) exchange<4>(v);
  if constexpr (kLanes >= 16) exchange<8>(v);
}

}  // namespace p2pfast::P2PFAST_LEVEL
