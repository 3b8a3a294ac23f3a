// Normalisation with activation and residual for training, forward and backward, over NCHW and NHWC tensors.
// The backward pass recomputes everything from the input and its statistics.
//
//   y = act(z),  z = weight * (x - mean) * rstd + bias + residual
//   dz = dy * act'(z),  dresidual = dz
//   dx = weight * rstd * (dz - mean(dz) - (x - mean) * rstd * mean(dz * (x - mean) * rstd))
#pragma once

#include <cstdint>

#include "cpu/conv.h"
#include "cpu/level.h"

namespace p2pfast {

struct NormActArgs {
  const void* x;         // dense, (images, channels, pixels) if `planes`, else (images, pixels, channels)
  const void* residual;  // like x, or null
  const void* dy;        // like x; of the backward pass
  void* out;             // y, or dx
  void* dresidual;       // like x, or null
  DType dtype;
  bool planes;
  int64_t images, channels, pixels;
  bool over_batch;  // one mean a channel for the whole batch
  bool frozen;      // mean and variance are given, and no function of x
  float eps;
  const float* weight;  // channels values or null
  const float* bias;
  // (images, channels), or (channels) if over_batch; written by the forward pass unless frozen. The variance
  // is biased.
  float* mean;
  float* variance;
  // channels values: the sums of dz * (x - mean) * rstd and of dz.
  float* dweight;
  float* dbias;
  Act act;
  float slope;
  float* workspace;  // norm_act_workspace() floats
};

struct NormActKernels {
  void (*forward)(const NormActArgs& args);
  void (*backward)(const NormActArgs& args);
};

P2PFAST_PER_LEVEL(NormActKernels, norm_act_kernels)

inline constexpr int64_t kNormBand = 256;  // NHWC pixels of one partial sum

// What is known of one mean each: rstd, and the two sums of the backward pass.
inline int64_t norm_act_means(const NormActArgs& a) {
  return a.over_batch ? a.channels : a.images * a.channels;
}
inline float* norm_act_rstd(const NormActArgs& a) { return a.workspace; }
inline float* norm_act_sums(const NormActArgs& a) { return a.workspace + norm_act_means(a); }
inline float* norm_act_products(const NormActArgs& a) { return a.workspace + 2 * norm_act_means(a); }
// Partial sums: [image][band][2][channel].
inline float* norm_act_partials(const NormActArgs& a) { return a.workspace + 3 * norm_act_means(a); }

// These throw std::invalid_argument naming what is wrong; the last two run on the calling thread's pool.
int64_t norm_act_workspace(const NormActArgs& args);
void norm_act_forward(const NormActArgs& args);
void norm_act_backward(const NormActArgs& args);

}  // namespace p2pfast
