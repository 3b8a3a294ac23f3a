// The register-blocked matrix microkernel behind every convolution: C[m, n] (+)= sum_k A[m, k] B[k, n].
// A has one row a pixel (or tile), any row stride; B is packed in panels of kPanel columns, each panel
// K rows of its width; C is a float32 scratch of row stride ldc.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kPanelVectors = kLanes == 16 ? 4 : 2;
inline constexpr int kPanel = kPanelVectors * kLanes;  // columns of a full panel
inline constexpr int kMaxRows = 6;

template <int kRows, int kVectors>
__attribute__((noinline)) void gemm_micro(const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                                          int k, bool accumulate) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) acc[m][n] = accumulate ? load(c + m * ldc + n * kLanes) : Vec{};
  }
  for (int i = 0; i < k; ++i) {
    Vec row[kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec x = splat(a[m * lda + i]);
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) acc[m][n] += x * row[n];
    }
    b += kVectors * kLanes;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
  }
}

template <int kVectors>
void gemm_rows(int rows, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int k,
               bool accumulate) {
  constexpr int kFull = kVectors == 3 && kLanes < 16 ? 4 : kMaxRows;
  for (; rows >= kFull; rows -= kFull) {
    gemm_micro<kFull, kVectors>(a, lda, b, c, ldc, k, accumulate);
    a += kFull * lda;
    c += kFull * ldc;
  }
  switch (rows) {
    case 1:
      return gemm_micro<1, kVectors>(a, lda, b, c, ldc, k, accumulate);
    case 2:
      return gemm_micro<2, kVectors>(a, lda, b, c, ldc, k, accumulate);
    case 3:
      return gemm_micro<3, kVectors>(a, lda, b, c, ldc, k, accumulate);
    case 4:
      if constexpr (kFull > 4) return gemm_micro<4, kVectors>(a, lda, b, c, ldc, k, accumulate);
      break;
    case 5:
      if constexpr (kFull > 4) return gemm_micro<5, kVectors>(a, lda, b, c, ldc, k, accumulate);
      break;
    default:
      break;
  }
}

// One panel of `vectors` * kLanes columns.
inline void gemm_panel(int vectors, int rows, const float* a, int64_t lda, const float* b, float* c,
                       int64_t ldc, int k, bool accumulate) {
  switch (vectors) {
    case 1:
      return gemm_rows<1>(rows, a, lda, b, c, ldc, k, accumulate);
    case 2:
      return gemm_rows<2>(rows, a, lda, b, c, ldc, k, accumulate);
    case 3:
      return gemm_rows<3>(rows, a, lda, b, c, ldc, k, accumulate);
    default:
      if constexpr (kLanes == 16) gemm_rows<4>(rows, a, lda, b, c, ldc, k, accumulate);
  }
}

}  // namespace p2pfast::P2PFAST_LEVEL
