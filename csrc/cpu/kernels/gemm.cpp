#include "cpu/gemm.h"

#include <utility>

namespace p2pfast::P2PFAST_LEVEL {
namespace {

// Aligned: how fast the loop is fetched would else depend on what comes before it.
template <int kRows, int kVectors, class A, class B>
__attribute__((aligned(64))) void gemm_micro(const A* const* rows, const B* b, float* c, int64_t ldc, int k,
                                             bool accumulate, const char* next, int step) {
  const A* a[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) a[m] = rows[m];
  // What was summed before is added at the end: by then it has come from the L2 cache.
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors * kLanes; n += 16) __builtin_prefetch(c + m * ldc + n, 1, 3);
  }
  Vec acc[kRows][kVectors] = {};
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
  if (accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) acc[m][n] += load(c + m * ldc + n * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
  }
}

template <class B, int kVectors, int kRows>
constexpr typename GemmMicros<B>::Micro micro() {
  constexpr int kFull = full_rows(kVectors);
  if constexpr (kRows == kFull || kRows <= min2(kFull, kMaxRows)) {
    return gemm_micro<kRows, kVectors, Factor<B>, B>;
  } else {
    return nullptr;
  }
}

template <class B>
constexpr GemmMicros<B> all_micros() {
  GemmMicros<B> all{};
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    ((all.of[kIndex / kMostRows + 1][kIndex % kMostRows + 1] =
          micro<B, kIndex / kMostRows + 1, kIndex % kMostRows + 1>()),
     ...);
  }(std::make_integer_sequence<int, kMostVectors * kMostRows>{});
  return all;
}

}  // namespace

constexpr GemmMicros<float> gemm_micros_float = all_micros<float>();
constexpr GemmMicros<bf16> gemm_micros_bf16 = all_micros<bf16>();
constexpr GemmMicros<Pair> gemm_micros_pair = all_micros<Pair>();

}  // namespace p2pfast::P2PFAST_LEVEL
