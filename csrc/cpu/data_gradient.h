// The gradient of a convolution's loss for its input, from the output's gradient, by the transpose of minimal
// filtering; see p2pfast/ops/data_gradient/README.md. Other shapes are convolutions themselves.
#pragma once

#include <cstdint>

#include "cpu/conv.h"

namespace p2pfast {

struct DataGradientArgs {
  // Geometry and weights of the convolution itself. Of its source only the channels are used; the members
  // that describe packed weights, output and statistics are not.
  ConvArgs conv;
  Source grad;  // out_height x out_width, out_channels
  Output out;   // images x height x width, the source's channels
  void* workspace;
};

struct DataGradientKernel {
  // Why this shape cannot run here, or null.
  const char* (*refuses)(const DataGradientArgs& args);
  int64_t (*workspace_bytes)(const DataGradientArgs& args, int threads);
  // In parallel. Sums have an order that only the shape decides.
  void (*run)(const DataGradientArgs& args);
};

P2PFAST_PER_LEVEL(DataGradientKernel, data_gradient)

}  // namespace p2pfast
