// csrc/cpu/instance_pool.h on an NVIDIA GPU, from pixels sorted by region.
#pragma once

#include <cstdint>

namespace p2pfast::cuda {

inline constexpr int64_t kPoolChunk = 2048;  // pixels of one region that a block sums

struct InstancePool {
  // Elements (n, c, p) of both are at n * image_stride + c * channel_stride + p * pixel_stride.
  const void* features;
  void* out;
  int32_t type;  // 0 (float32), 1 (bfloat16) or 2 (float16)
  int64_t images, channels, pixels;
  int64_t image_stride, channel_stride, pixel_stride;
  const int64_t* region;       // (images * pixels), in [0, regions)
  const int64_t* order;        // (images * pixels): the pixels, region by region
  const int64_t* start;        // (regions + 1): where a region begins in `order`
  const int64_t* first_chunk;  // (regions + 1): how many chunks of kPoolChunk the regions before it have
  int64_t regions;
  int64_t chunks;    // at least first_chunk[regions]
  double* partials;  // (chunks, channels)
  float* means;      // (regions, channels)
};

// Sums are float32 over at most kPoolChunk / 8 pixels and float64 over those, in a fixed order. Addresses are
// on `device`; `stream` is a cudaStream_t (torch's `cuda_stream`), 0 the default one. Returns before the work
// is done. Throws std::invalid_argument naming what is wrong, and std::runtime_error with CUDA's own message
// if a launch fails.
void instance_pool(const InstancePool& args, int device, uintptr_t stream);

}  // namespace p2pfast::cuda
