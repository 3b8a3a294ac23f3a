// The kernels of cuda/instance_pool.h: sums of chunks of a region, means of the regions, and the means at the
// pixels.
#pragma once

#include "cuda/instance_pool.h"
#include "cuda/numbers.h"
#include "cuda/phases.h"

namespace p2pfast::cuda {

// A block sums a chunk for up to 32 channels; its threads are lanes of pixels times channels.
template <class T>
struct PoolSumKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 2;
  static constexpr int kResident = 4;
  static constexpr int kMaxChannelBits = 5;

  struct Args {
    InstancePool pool;
    uint32_t channel_blocks;
    int32_t channel_bits;
  };
  struct Shared {
    double sum[kThreads];
  };
  struct Local {
    int64_t chunk, region;  // region -1: there is no such chunk
  };

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared& s, Local& local) {
    const InstancePool& pool = a.pool;
    const int channels = 1 << a.channel_bits;
    const int64_t c =
        int64_t{static_cast<uint32_t>(block) % a.channel_blocks} * channels + (thread & (channels - 1));
    if constexpr (kPhase == 0) {
      local.chunk = static_cast<uint32_t>(block) / a.channel_blocks;
      local.region = -1;
      s.sum[thread] = 0;
      if (local.chunk >= pool.first_chunk[pool.regions]) return;
      // The last region that begins with this chunk or before: empty ones begin where the next one does.
      int64_t low = 0, high = pool.regions - 1;
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (pool.first_chunk[middle] <= local.chunk) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      local.region = low;
      if (c >= pool.channels) return;
      const int64_t begin = pool.start[low] + (local.chunk - pool.first_chunk[low]) * kPoolChunk;
      const int64_t end = min2(begin + kPoolChunk, pool.start[low + 1]);
      const T* const features = static_cast<const T*>(pool.features) + c * pool.channel_stride;
      // A region is of one image, so the chunk's first pixel tells which.
      const int64_t image = pool.order[begin] / pool.pixels;
      const T* const base = features + image * pool.image_stride;
      float sum = 0;
      for (int64_t i = begin + (thread >> a.channel_bits); i < end; i += kThreads >> a.channel_bits)
        sum += widened(base[(pool.order[i] - image * pool.pixels) * pool.pixel_stride]);
      s.sum[thread] = sum;
    } else {
      if (thread >= channels || local.region < 0 || c >= pool.channels) return;
      double sum = 0;
      for (int i = thread; i < kThreads; i += channels) sum += s.sum[i];
      pool.partials[local.chunk * pool.channels + c] = sum;
    }
  }
};

// A mean a thread.
struct PoolMeanKernel {
  static constexpr int kThreads = 128;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 8;
  struct Args {
    InstancePool pool;
  };
  struct Shared {};
  struct Local {};

  static int64_t blocks(const InstancePool& pool) { return ceil_div(pool.regions * pool.channels, kThreads); }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const InstancePool& pool = a.pool;
    const int64_t i = block * kThreads + thread, region = i / pool.channels, c = i - region * pool.channels;
    if (region >= pool.regions) return;
    const int64_t count = pool.start[region + 1] - pool.start[region];
    if (count == 0) return;
    double sum = 0;
    for (int64_t chunk = pool.first_chunk[region]; chunk < pool.first_chunk[region + 1]; ++chunk)
      sum += pool.partials[chunk * pool.channels + c];
    pool.means[i] = static_cast<float>(sum / static_cast<double>(count));
  }
};

// A pixel a thread.
template <class T>
struct PoolWriteKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 6;
  struct Args {
    InstancePool pool;
  };
  struct Shared {};
  struct Local {};

  static int64_t blocks(const InstancePool& pool) { return ceil_div(pool.images * pool.pixels, kThreads); }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const InstancePool& pool = a.pool;
    const int64_t i = block * kThreads + thread;
    if (i >= pool.images * pool.pixels) return;
    const int64_t n = i / pool.pixels;
    const float* const mean = pool.means + pool.region[i] * pool.channels;
    T* const out =
        static_cast<T*>(pool.out) + n * pool.image_stride + (i - n * pool.pixels) * pool.pixel_stride;
    for (int64_t c = 0; c < pool.channels; ++c) narrow(mean[c], out + c * pool.channel_stride);
  }
};

// Calls launch.operator()<Kernel>(args, blocks) for each kernel in turn.
template <class Launch>
void run_instance_pool(const InstancePool& pool, Launch&& launch) {
  const auto run = [&]<class T>(T) {
    typename PoolSumKernel<T>::Args args{pool, 1, 0};
    while (args.channel_bits < PoolSumKernel<T>::kMaxChannelBits && 1 << args.channel_bits < pool.channels)
      ++args.channel_bits;
    const int64_t channel_blocks = ceil_div(pool.channels, int64_t{1} << args.channel_bits);
    args.channel_blocks = static_cast<uint32_t>(channel_blocks);
    launch.template operator()<PoolSumKernel<T>>(args, pool.chunks * channel_blocks);
    launch.template operator()<PoolMeanKernel>(PoolMeanKernel::Args{pool}, PoolMeanKernel::blocks(pool));
    launch.template operator()<PoolWriteKernel<T>>({pool}, PoolWriteKernel<T>::blocks(pool));
  };
  if (pool.type == 0) return run(float{});
  if (pool.type == 1) return run(BFloat16{});
  return run(Float16{});
}

}  // namespace p2pfast::cuda
