// Normalisation with activation and residual for training: forward over the planes of NCHW tensors, and
// the backward pass over NCHW and NHWC ones, which recomputes everything from the input and its
// statistics.
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
  bool frozen;      // mean and rstd are given, and no function of x
  float eps;
  const float* weight;  // channels values or null
  const float* bias;
  // (images, channels), or (channels) if over_batch; written by the forward pass unless frozen.
  float* mean;
  float* rstd;
  float* variance;  // biased, or null
  // Like mean: the sums of dz * (x - mean) * rstd and of dz.
  float* dweight;
  float* dbias;
  Act act;
  float slope;
  float* partial;  // norm_act_partials() floats
};

struct NormActKernels {
  void (*forward)(const NormActArgs& args);  // planes only
  void (*backward)(const NormActArgs& args);
};

P2PFAST_PER_LEVEL(NormActKernels, norm_act_kernels)

// Workspace of the backward pass over NHWC tensors, in floats.
int64_t norm_act_partials(const NormActArgs& args);

inline constexpr int64_t kNormBand = 256;  // pixels of one partial sum

// Both run on the calling thread's pool and throw std::invalid_argument naming what is wrong.
void norm_act_forward(const NormActArgs& args);
void norm_act_backward(const NormActArgs& args);

}  // namespace p2pfast
