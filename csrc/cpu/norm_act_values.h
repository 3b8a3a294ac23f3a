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

// The gradient before an activation of z from the one after it. As in PyTorch zero is on the negative side,
// and relu drops what is not finite there.
template <Act kAct>
P2PFAST_INLINE Vec before_act(Vec dy, Vec z, Vec slope) {
  const Vec one = splat(1.0f);
  if constexpr (kAct == Act::kRelu) return z <= 0.0f ? Vec{} : dy;
  if constexpr (kAct == Act::kLeaky) return dy * (z > 0.0f ? one : slope);
  if constexpr (kAct == Act::kTanh) {
    const Vec y = tanh_vec(z);
    return dy * (1.0f - y * y);
  }
  if constexpr (kAct == Act::kSigmoid) {
    const Vec y = sigmoid_vec(z);
    return dy * (y * (1.0f - y));
  }
  if constexpr (kAct == Act::kElu) return dy * (z > 0.0f ? one : slope * exp_vec(z));
  if constexpr (kAct == Act::kSilu) {
    const Vec y = sigmoid_vec(z);
    return dy * (y + z * y * (1.0f - y));
  }
  return dy;
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
