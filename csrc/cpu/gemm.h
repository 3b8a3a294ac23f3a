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

// The kernels of kernels/gemm.cpp for elements B: of[vectors][rows] computes `rows` rows of a panel of
// `vectors` vectors, for 1 to 3 vectors (4 with 16 lanes) and 1 to min2(kMaxRows, full_rows(vectors)) or
// full_rows(vectors) rows. While it computes, the lines from `next` on are brought into the cache, `step`
// bytes further for each four values of k: weights that are used once come from memory in the meantime.
inline constexpr int kMostVectors = kLanes == 16 ? 4 : 3, kMostRows = 8;
template <class B>
struct GemmMicros {
  using Micro = void (*)(const Factor<B>* const* rows, const B* b, float* c, int64_t ldc, int k,
                         bool accumulate, const char* next, int step);
  Micro of[kMostVectors + 1][kMostRows + 1];
};
extern const GemmMicros<float> gemm_micros_float;
extern const GemmMicros<bf16> gemm_micros_bf16;
extern const GemmMicros<Pair> gemm_micros_pair;
P2PFAST_INLINE const GemmMicros<float>& gemm_micros(const float*) { return gemm_micros_float; }
P2PFAST_INLINE const GemmMicros<bf16>& gemm_micros(const bf16*) { return gemm_micros_bf16; }
P2PFAST_INLINE const GemmMicros<Pair>& gemm_micros(const Pair*) { return gemm_micros_pair; }

// `row(m)` is where row m of A begins.
template <class Row, class B>
P2PFAST_INLINE void gemm_rows(int vectors, int rows, Row&& row, const B* b, float* c, int64_t ldc, int k,
                              bool accumulate, const char* next) {
  const int full = full_rows(vectors), part = min2(full, kMaxRows);
  // The next panel is as long as this one; each group of rows fetches its share.
  int step = vectors * kLanes * 4 * static_cast<int>(sizeof(B));
  if (rows >= 2 * full) step /= rows / full;
  const auto* const micros = gemm_micros(b).of[vectors];
  const Factor<B>* a[kMostRows];
  for (int m = 0; m < rows;) {
    const int left = rows - m, count = left >= full ? full : min2(part, left);
    for (int i = 0; i < count; ++i) a[i] = row(m + i);
    micros[count](a, b, c + m * ldc, ldc, k, accumulate, next, step);
    m += count;
    next += static_cast<int64_t>(step) * (k / 4);
  }
}

inline constexpr int kMaxDepth = 384;  // of one product

// One panel of `vectors` * kLanes columns, `k` at most kMaxDepth; `next` is the panel that will be used after
// it. bfloat16 that is not in pairs is widened once where many rows use it.
template <class Row, class B>
P2PFAST_INLINE void gemm_panel(int vectors, int rows, Row&& row, const B* b, float* c, int64_t ldc, int k,
                               bool accumulate, const B* next) {
  const char* line = reinterpret_cast<const char*>(next);
  if constexpr (sizeof(B) == 2) {
    if (rows > 2 * kMaxRows) {
      alignas(64) float wide[kMaxDepth * kPanel];
      for (int i = 0; i < k * vectors * kLanes; i += kLanes) store(wide + i, load(b + i));
      const float* const panel = wide;
      return gemm_rows(vectors, rows, row, panel, c, ldc, k, accumulate, line);
    }
  }
  gemm_rows(vectors, rows, row, b, c, ldc, k, accumulate, line);
}

}  // namespace p2pfast::P2PFAST_LEVEL
