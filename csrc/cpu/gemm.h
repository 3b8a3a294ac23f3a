// The register-blocked matrix microkernel behind every convolution: C[m, n] (+)= sum_k A[m, k] B[k, n].
// A has one row a pixel (or tile), which may lie anywhere; B is packed in panels of kPanel columns, each
// panel K rows of its width; C is a float32 scratch of row stride ldc. A and B are float32, or B is bfloat16
// and widened, or both are pairs of bfloat16: an element is then two consecutive values of the depth, and K
// counts pairs.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kPanelVectors = kLanes == 16 ? 4 : 2;
inline constexpr int kPanel = kPanelVectors * kLanes;  // columns of a full panel
inline constexpr int kMaxRows = 6;
inline constexpr int kPrefetched = kLanes == 16 ? 4 : 1;  // cache lines for four values of k

// Rows whose sums fill the vector registers, 32 with 16 lanes and else 16, beside a row of B and a value of
// A. Narrow panels have 8 rows, or their few sums would wait for one another; more have no registers for
// their addresses.
constexpr int full_rows(int vectors) {
  if (kLanes == 16) return vectors == 4 ? 6 : vectors == 3 ? 7 : 8;
  return vectors == 3 ? 4 : 6;
}

// What B's elements are multiplied with.
template <class B>
struct FactorOf {
  using Type = float;
};
template <>
struct FactorOf<Pair> {
  using Type = Pair;
};
template <class B>
using Factor = typename FactorOf<B>::Type;

template <class B>
inline constexpr int kValues = 1;  // of the depth in an element
template <>
inline constexpr int kValues<Pair> = 2;

// Writes value (k, n) of a panel of B, or the values from there on.
template <class B>
P2PFAST_INLINE void set_value(B* b, int64_t width, int64_t k, int64_t n, float v) {
  put(b + k * width + n, v);
}
P2PFAST_INLINE void set_value(Pair* b, int64_t width, int64_t k, int64_t n, float v) {
  Pair& pair = b[k / 2 * width + n];
  put(k % 2 == 0 ? &pair.first : &pair.second, v);
}
template <class B>
P2PFAST_INLINE void set_values(B* b, int64_t width, int64_t k, int64_t n, Vec v) {
  store(b + k * width + n, v);
}
// Values of an even k come first: the other half is zero until its values come.
P2PFAST_INLINE void set_values(Pair* b, int64_t width, int64_t k, int64_t n, Vec v) {
  bf16 rounded[kLanes];
  store(rounded, v);
  const VecPairs half = widen(rounded);
  Pair* at = b + k / 2 * width + n;
  store(at, k % 2 == 0 ? half : load(at) | half << 16);
}

// While it computes, the lines from `next` on are brought into the cache, `step` bytes further for each
// four values of k: weights that are used once come from memory in the meantime.
template <int kRows, int kVectors, class A, class B>
__attribute__((noinline)) void gemm_micro(const A* const* rows, const B* b, float* c, int64_t ldc, int k,
                                          bool accumulate, const char* next, int step) {
  const A* a[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) a[m] = rows[m];
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) acc[m][n] = accumulate ? load(c + m * ldc + n * kLanes) : Vec{};
  }
  auto advance = [&](int i) {
    decltype(load(b)) row[kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const auto x = splat(a[m][i]);
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) acc[m][n] = multiply_add(acc[m][n], x, row[n]);
    }
    b += kVectors * kLanes;
  };
  int i = 0;
  for (; i + 4 <= k; i += 4) {
#pragma GCC unroll 4
    for (int line = 0; line < kPrefetched; ++line) __builtin_prefetch(next + 64 * line, 0, 2);
    next += step;
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) advance(i + u);
  }
  for (; i < k; ++i) advance(i);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
  }
}

// `row(m)` is where row m of A begins.
template <int kVectors, class Row, class B>
void gemm_rows(int rows, Row&& row, const B* b, float* c, int64_t ldc, int k, bool accumulate,
               const char* next) {
  constexpr int kFull = full_rows(kVectors), kPart = min2(kFull, kMaxRows);
  // The next panel is as long as this one; each group of rows fetches its share.
  const int step = kVectors * kLanes * 4 * static_cast<int>(sizeof(B)) / max2(1, rows / kFull);
  decltype(row(0)) a[kFull];
  for (int m = 0; m < rows;) {
    const int left = rows - m, count = left >= kFull ? kFull : min2(kPart, left);
    for (int i = 0; i < count; ++i) a[i] = row(m + i);
    auto run = [&]<int kRows>() {
      if constexpr (kRows <= kFull)
        gemm_micro<kRows, kVectors>(a, b, c + m * ldc, ldc, k, accumulate, next, step);
    };
    switch (count) {
      case 1:
        run.template operator()<1>();
        break;
      case 2:
        run.template operator()<2>();
        break;
      case 3:
        run.template operator()<3>();
        break;
      case 4:
        run.template operator()<4>();
        break;
      case 5:
        run.template operator()<5>();
        break;
      case 6:
        run.template operator()<6>();
        break;
      default:
        run.template operator()<kFull>();
        break;
    }
    m += count;
    next += static_cast<int64_t>(step) * (k / 4);
  }
}

inline constexpr int kMaxDepth = 384;  // of one product

// One panel of `vectors` * kLanes columns, `k` at most kMaxDepth; `next` is the panel that will be used after
// it. bfloat16 that is not in pairs is widened once where many rows use it.
template <class Row, class B>
void gemm_panel(int vectors, int rows, Row&& row, const B* b, float* c, int64_t ldc, int k, bool accumulate,
                const B* next) {
  const char* line = reinterpret_cast<const char*>(next);
  auto run = [&](const auto* panel) {
    switch (vectors) {
      case 1:
        return gemm_rows<1>(rows, row, panel, c, ldc, k, accumulate, line);
      case 2:
        return gemm_rows<2>(rows, row, panel, c, ldc, k, accumulate, line);
      case 3:
        return gemm_rows<3>(rows, row, panel, c, ldc, k, accumulate, line);
      default:
        if constexpr (kLanes == 16) gemm_rows<4>(rows, row, panel, c, ldc, k, accumulate, line);
    }
  };
  if constexpr (sizeof(B) == 2) {
    if (rows > 2 * kMaxRows) {
      alignas(64) float wide[kMaxDepth * kPanel];
      for (int i = 0; i < k * vectors * kLanes; i += kLanes) store(wide + i, load(b + i));
      return run(wide);
    }
  }
  run(b);
}

}  // namespace p2pfast::P2PFAST_LEVEL
