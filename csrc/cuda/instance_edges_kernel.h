// A pixel a thread. A row's neighbours come from L1, so memory sees each id about once; at 2048x1024 the
// launch itself takes most of the time.
#pragma once

#include "cpu/instance_edges.h"
#include "cuda/phases.h"

namespace p2pfast::cuda {

template <class T>
struct InstanceEdgesKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 6;

  struct Args {
    InstanceEdges map;
    uint32_t blocks_across;
  };
  struct Shared {};
  struct Local {};

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const InstanceEdges& map = a.map;
    // Grids have fewer than 2^31 blocks, so divisions of 32 bits do.
    const uint32_t line = static_cast<uint32_t>(block) / a.blocks_across;
    const int64_t x = int64_t{static_cast<uint32_t>(block) % a.blocks_across} * kThreads + thread;
    if (x >= map.width) return;
    const int64_t n = line / static_cast<uint32_t>(map.height), y = line % static_cast<uint32_t>(map.height);
    const T* const row = static_cast<const T*>(map.ids) + n * map.image_stride + y * map.row_stride;
    const T id = row[x];
    bool edge = false;
    if (x > 0) edge |= id != row[x - 1];
    if (x + 1 < map.width) edge |= id != row[x + 1];
    if (y > 0) edge |= id != row[x - map.row_stride];
    if (y + 1 < map.height) edge |= id != row[x + map.row_stride];
    map.edges[int64_t{line} * map.width + x] = edge;
  }
};

// Calls launch.operator()<Kernel>(args, blocks).
template <class Launch>
void run_instance_edges(const InstanceEdges& map, Launch&& launch) {
  const auto run = [&]<class T>(T) {
    using Kernel = InstanceEdgesKernel<T>;
    const int64_t across = ceil_div(map.width, Kernel::kThreads);
    int64_t blocks = 0;
    if (__builtin_mul_overflow(map.images * map.height, across, &blocks)) blocks = INT64_MAX;
    launch.template operator()<Kernel>({map, static_cast<uint32_t>(across)}, blocks);
  };
  switch (map.element_size) {
    case 1:
      return run(uint8_t{});
    case 2:
      return run(uint16_t{});
    case 4:
      return run(uint32_t{});
    default:
      return run(uint64_t{});
  }
}

}  // namespace p2pfast::cuda
