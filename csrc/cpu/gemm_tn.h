// C[m, n] (+)= sum_k A[k, m] B[k, n]: the matrix product of weight gradients, where both operands have one
// row a pixel (or tile), so nothing has to be packed. Elements T are float32, or pairs of bfloat16 from two
// pixels: K counts pairs then.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kRowsTn = 6;
inline constexpr int kVectorsTn = kLanes == 16 ? 4 : 2;
inline constexpr int kDepthTn = 128;  // rows of A and B that stay in the L1 cache

template <int kRows, int kVectors, class T>
__attribute__((noinline)) void micro_tn(const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
                                        int64_t ldc, int k, bool accumulate) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) acc[m][n] = accumulate ? load(c + m * ldc + n * kLanes) : Vec{};
  }
#pragma GCC unroll 2
  for (int i = 0; i < k; ++i, a += lda, b += ldb) {
    decltype(load(b)) row[kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const auto x = splat(a[m]);
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) acc[m][n] = multiply_add(acc[m][n], x, row[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
  }
}

template <int kVectors, class T>
void rows_tn(int rows, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int k,
             bool accumulate) {
  for (int m = 0; m < rows; m += kRowsTn, a += kRowsTn, c += kRowsTn * ldc) {
    switch (min2(kRowsTn, rows - m)) {
      case 1:
        micro_tn<1, kVectors>(a, lda, b, ldb, c, ldc, k, accumulate);
        break;
      case 2:
        micro_tn<2, kVectors>(a, lda, b, ldb, c, ldc, k, accumulate);
        break;
      case 3:
        micro_tn<3, kVectors>(a, lda, b, ldb, c, ldc, k, accumulate);
        break;
      case 4:
        micro_tn<4, kVectors>(a, lda, b, ldb, c, ldc, k, accumulate);
        break;
      case 5:
        micro_tn<5, kVectors>(a, lda, b, ldb, c, ldc, k, accumulate);
        break;
      default:
        micro_tn<6, kVectors>(a, lda, b, ldb, c, ldc, k, accumulate);
        break;
    }
  }
}

// `columns` of B and C, rounded up to vectors, are read and written.
template <class T>
void gemm_tn(int rows, int columns, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
             int k, bool accumulate) {
  for (int k0 = 0; k0 < k; k0 += kDepthTn, a += kDepthTn * lda, b += kDepthTn * ldb) {
    const int depth = min2(kDepthTn, k - k0);
    const bool more = accumulate || k0 > 0;
    int n = 0;
    for (; n + (kVectorsTn - 1) * kLanes < columns; n += kVectorsTn * kLanes)
      rows_tn<kVectorsTn>(rows, a, lda, b + n, ldb, c + n, ldc, depth, more);
    for (; n < columns; n += kLanes) rows_tn<1>(rows, a, lda, b + n, ldb, c + n, ldc, depth, more);
  }
}

}  // namespace p2pfast::P2PFAST_LEVEL
