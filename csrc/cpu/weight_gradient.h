// The gradient of a convolution's loss for its weights, from the input and the output's gradient:
//   out[o, i, ky, kx] = sum over n, y, x of grad[n, o, y, x] * input[n, i, stride * y + ky - pad, ...].
// That of a transposed convolution is the same with input and gradient exchanged.
#pragma once

#include <cstdint>

#include "cpu/conv.h"

namespace p2pfast {

struct WeightGradientArgs {
  // Geometry and input; its deferred normalisation, padding mode and second source are done as it is read.
  // Not transposed. The members that describe weights, output and statistics are not used.
  ConvArgs conv;
  Source grad;  // out_height x out_width, out_channels
  void* out;    // (out_channels, channels, kernel_h, kernel_w), contiguous
  DType out_dtype;
  void* workspace;
};

enum class WeightGradientAlgorithm : int32_t {
  kMinimal = 0,  // minimal filtering, the transpose of the convolution's; see toom.h
  kTaps = 1,     // matrix product whose columns are the weights of an output in order: few pixels
  kRows = 2,     // matrix products of rows of pixels: few channels
  kPairs = 3,    // the same of bfloat16 pairs
};
inline constexpr int kWeightGradientAlgorithms = 4;

struct WeightGradientKernel {
  // Why this shape cannot run here, or null.
  const char* (*refuses)(const WeightGradientArgs& args);
  int64_t (*workspace_bytes)(const WeightGradientArgs& args, int threads);
  // In parallel. Sums have an order that only the shape decides.
  void (*run)(const WeightGradientArgs& args);
};

P2PFAST_PER_LEVEL(WeightGradientKernel, minimal_gradient)
P2PFAST_PER_LEVEL(WeightGradientKernel, taps_gradient)
P2PFAST_PER_LEVEL(WeightGradientKernel, rows_gradient)
P2PFAST_PER_LEVEL(WeightGradientKernel, pairs_gradient)

inline const WeightGradientKernel& weight_gradient_kernel(WeightGradientAlgorithm algorithm) {
  switch (algorithm) {
    case WeightGradientAlgorithm::kMinimal:
      return minimal_gradient();
    case WeightGradientAlgorithm::kTaps:
      return taps_gradient();
    case WeightGradientAlgorithm::kPairs:
      return pairs_gradient();
    default:
      return rows_gradient();
  }
}

}  // namespace p2pfast
