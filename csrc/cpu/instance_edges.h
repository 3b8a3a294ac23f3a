// Edges between instances: a pixel is an edge if its id differs from the id of its left, right,
// upper or lower neighbour (neighbours outside the image do not count). pix2pixHD's `get_edges`.
#pragma once

#include <cstdint>

#include "cpu/level.h"

namespace p2pfast {

struct InstanceEdges {
  const void* ids;   // (images, height, width) integers, unit stride along the width
  int element_size;  // bytes of an id: 1, 2, 4 or 8; only equality matters, so the sign does not
  uint8_t* edges;    // (images, height, width), dense: 1 on an edge, 0 elsewhere
  int64_t images, height, width;
  int64_t image_stride;  // in elements
  int64_t row_stride;    // in elements; 0 and negative strides are allowed
};

// Throws std::invalid_argument, naming the member and its value. Shared by the CPU and CUDA kernels.
void check(const InstanceEdges& args);

// Runs on the calling thread's pool. Throws as check() does.
void instance_edges(const InstanceEdges& args);

// One row: `above` and `below` are the neighbouring rows, or `row` itself at the border.
struct InstanceEdgesKernels {
  void (*row8)(const void* above, const void* row, const void* below, uint8_t* edges, int64_t width);
  void (*row16)(const void* above, const void* row, const void* below, uint8_t* edges, int64_t width);
  void (*row32)(const void* above, const void* row, const void* below, uint8_t* edges, int64_t width);
  void (*row64)(const void* above, const void* row, const void* below, uint8_t* edges, int64_t width);
};

P2PFAST_PER_LEVEL(InstanceEdgesKernels, instance_edges_kernels)

}  // namespace p2pfast
