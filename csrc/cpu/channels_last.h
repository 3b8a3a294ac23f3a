// From planes (NCHW) to pixels (NHWC), and to another type, in one pass over memory.
#pragma once

#include <cstdint>

#include "cpu/conv.h"
#include "cpu/level.h"

namespace p2pfast {

struct ChannelsLast {
  const void* data;
  DType dtype;
  int64_t images, channels, height, width;
  // Element (n, c, y, x) is data[n * image_stride + c * channel_stride + y * row_stride + x].
  int64_t image_stride, channel_stride, row_stride;
  void* out;  // (images, height, width, channels), dense
  DType out_dtype;
};

// Runs on the calling thread's pool. Throws std::invalid_argument, naming the member and its value.
void channels_last(const ChannelsLast& args);

struct ChannelsLastKernels {
  void (*run)(const ChannelsLast& args);
};

P2PFAST_PER_LEVEL(ChannelsLastKernels, channels_last_kernels)

}  // namespace p2pfast
