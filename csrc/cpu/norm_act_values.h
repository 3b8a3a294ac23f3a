// What the passes of norm_act have in common.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/merged.h"
#include "cpu/norm_act.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"

namespace p2pfast::P2PFAST_LEVEL {

template <Act kAct>
P2PFAST_INLINE Vec apply_act(Vec z, Vec slope) {
  if constexpr (kAct == Act::kElu) return z > 0.0f || z != z ? z : slope * (exp_vec(z) - 1.0f);
  return finish(z, kAct, slope[0]);
}

// As PyTorch: zero is on the negative side.
template <Act kAct>
P2PFAST_INLINE Vec derivative(Vec z, Vec slope) {
  const Vec one = splat(1.0f);
  if constexpr (kAct == Act::kRelu) return z > 0.0f ? one : Vec{};
  if constexpr (kAct == Act::kLeaky) return z > 0.0f ? one : slope;
  if constexpr (kAct == Act::kTanh) {
    const Vec y = tanh_vec(z);
    return 1.0f - y * y;
  }
  if constexpr (kAct == Act::kSigmoid) {
    const Vec y = sigmoid_vec(z);
    return y * (1.0f - y);
  }
  if constexpr (kAct == Act::kElu) return z > 0.0f ? one : slope * exp_vec(z);
  if constexpr (kAct == Act::kSilu) {
    const Vec y = sigmoid_vec(z);
    return y + z * y * (1.0f - y);
  }
  return one;
}

struct Normalized {
  Vec x, z;  // (x - mean) * rstd, and what the activation gets
};

// Writes the statistics of one mean.
inline void put_statistics(const NormActArgs& a, int64_t at, const Merged& merged) {
  const double variance = merged.m2 / merged.count;
  a.mean[at] = static_cast<float>(merged.mean);
  a.variance[at] = static_cast<float>(variance);
  norm_act_rstd(a)[at] = static_cast<float>(1.0 / __builtin_sqrt(variance + a.eps));
}

}  // namespace p2pfast::P2PFAST_LEVEL
