// The register-blocked matrix microkernel behind every convolution: C[m, n] (+)= sum_k A[m, k] B[k, n].
// A has one row a pixel (or tile), which may lie anywhere; B (float32 or bfloat16) is packed in
// panels of kPanel columns, each panel K rows of its width; C is a float32 scratch of row stride ldc.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kPanelVectors = kLanes == 16 ? 4 : 2;
inline constexpr int kPanel = kPanelVectors * kLanes;  // columns of a full panel
inline constexpr int kMaxRows = 6;
inline constexpr int kPrefetched = kLanes == 16 ? 2 : 1;  // cache lines for four values of k

// While it computes, the lines from `next` on are brought into the cache, `step` bytes further for each
// four values of k: weights that are used once come from memory in the meantime.
template <int kRows, int kVectors, class B>
__attribute__((noinline)) void gemm_micro(const float* const* rows, const B* b, float* c, int64_t ldc, int k,
                                          bool accumulate, const char* next, int step) {
  const float* a[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) a[m] = rows[m];
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) acc[m][n] = accumulate ? load(c + m * ldc + n * kLanes) : Vec{};
  }
  auto advance = [&](int i) {
    Vec row[kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec x = splat(a[m][i]);
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) acc[m][n] += x * row[n];
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
  constexpr int kFull = kVectors == 3 && kLanes < 16 ? 4 : kMaxRows;
  // The next panel is as long as this one; each group of rows fetches its share.
  const int step = kVectors * kLanes * 4 * static_cast<int>(sizeof(B)) / max2(1, rows / kFull);
  const float* a[kFull];
  for (int m = 0; m < rows; m += kFull) {
    const int count = min2(kFull, rows - m);
    for (int i = 0; i < count; ++i) a[i] = row(m + i);
    float* to = c + m * ldc;
    switch (count) {
      case 1:
        gemm_micro<1, kVectors>(a, b, to, ldc, k, accumulate, next, step);
        break;
      case 2:
        gemm_micro<2, kVectors>(a, b, to, ldc, k, accumulate, next, step);
        break;
      case 3:
        gemm_micro<3, kVectors>(a, b, to, ldc, k, accumulate, next, step);
        break;
      case 4:
        gemm_micro<4, kVectors>(a, b, to, ldc, k, accumulate, next, step);
        break;
      case 5:
        if constexpr (kFull > 4) gemm_micro<5, kVectors>(a, b, to, ldc, k, accumulate, next, step);
        break;
      default:
        if constexpr (kFull > 4) gemm_micro<6, kVectors>(a, b, to, ldc, k, accumulate, next, step);
        break;
    }
    next += static_cast<int64_t>(step) * (k / 4);
  }
}

inline constexpr int kMaxDepth = 384;  // of one product

// One panel of `vectors` * kLanes columns, `k` at most kMaxDepth; `next` is the panel that will be used after
// it. bfloat16 is widened once where many rows use it.
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
