// From a generator's output to 8-bit pixels: ((x + 1) / 2 * 255) clipped to [0, 255] and truncated, in
// float32, optionally after tanh. NaN becomes 0.
#pragma once

#include <cstdint>

#include "cpu/level.h"

namespace p2pfast {

enum class PixelType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct ImageUint8 {
  const void* data;
  PixelType type;
  int64_t images, channels, height, width;  // 1 to 4 channels
  // Element (n, c, y, x) is data[n * image_stride + c * channel_stride + y * row_stride + x * pixel_stride].
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
  bool tanh;
  uint8_t* out;  // (images, height, width, channels), dense
};

// Throws std::invalid_argument, naming the member and its value.
void check(const ImageUint8& args);

// Runs on the calling thread's pool. Throws as check() does.
void image_uint8(const ImageUint8& args);

struct ImageUint8Kernels {
  void (*run)(const ImageUint8& args);
};

P2PFAST_PER_LEVEL(ImageUint8Kernels, image_uint8_kernels)

}  // namespace p2pfast
