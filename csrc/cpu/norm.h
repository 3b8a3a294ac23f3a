// Statistics, their merge into a scale and a shift, and the pass that applies them where no
// convolution does it on load. Average pooling between the branches of a generator.
#pragma once

#include <cstdint>

#include "cpu/conv.h"
#include "cpu/level.h"

namespace p2pfast {

// Partial statistics of act(scale * data + shift), laid out as in ConvArgs; parts are bands of rows.
struct StatisticsArgs {
  Source source;
  int32_t images, height, width, channels;
  float* partial;
  float* count;
};

// scale = weight / sqrt(var + eps), shift = bias - mean * scale, for each image and channel.
struct MergeArgs {
  const float* partial;
  const float* count;
  int32_t images, channels;
  int64_t parts;
  bool over_batch;  // one mean for the whole batch (BatchNorm) instead of one an image
  float eps;
  const float* weight;  // channels values or null
  const float* bias;
  float* scale;  // images x round_up(channels, 16)
  float* shift;
  float* mean;      // optional, like scale: for running statistics
  float* variance;  // biased
};

// out = act(first * noise + second); each source with its own scale, shift and activation.
struct ApplyArgs {
  Source first, second;  // second.data null: absent
  const float* noise;    // dropout's factors, contiguous (images, channels, height, width), or null
  int32_t images, height, width, channels;
  Output out;
  Act act;
  float slope;
};

struct PoolArgs {
  Source source;
  int32_t images, height, width, channels, out_height, out_width;
  int32_t kernel, stride, pad;
  int32_t pad_top;  // rows of padding above: pad, or less where the input is a band of an image
  bool count_include_pad;
  Output out;
};

struct NormKernels {
  int64_t (*partials)(const StatisticsArgs& args);
  void (*statistics)(const StatisticsArgs& args);
  void (*merge)(const MergeArgs& args);
  void (*apply)(const ApplyArgs& args);
  void (*avg_pool)(const PoolArgs& args);
};

P2PFAST_PER_LEVEL(NormKernels, norm_kernels)

}  // namespace p2pfast
