#include "cpu/instance_edges.h"

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

template <class T>
P2PFAST_INLINE uint8_t vertical(const T* above, const T* row, const T* below, int64_t x) {
  return static_cast<uint8_t>((row[x] != above[x]) | (row[x] != below[x]));
}

template <class T>
void edges_row(const void* above_ids, const void* row_ids, const void* below_ids, uint8_t* __restrict edges,
               int64_t width) {
  const T* const above = static_cast<const T*>(above_ids);
  const T* const row = static_cast<const T*>(row_ids);
  const T* const below = static_cast<const T*>(below_ids);
  if (width == 1) {
    edges[0] = vertical(above, row, below, 0);
    return;
  }
  const int64_t last = width - 1;
  edges[0] = vertical(above, row, below, 0) | static_cast<uint8_t>(row[0] != row[1]);
  // The compiler vectorises this loop: unaligned loads, compares and a narrowing of the masks.
  for (int64_t x = 1; x < last; ++x) {
    edges[x] = static_cast<uint8_t>((row[x] != row[x - 1]) | (row[x] != row[x + 1]) | (row[x] != above[x]) |
                                    (row[x] != below[x]));
  }
  edges[last] = vertical(above, row, below, last) | static_cast<uint8_t>(row[last] != row[last - 1]);
}

}  // namespace

const InstanceEdgesKernels instance_edges_kernels = {&edges_row<uint8_t>, &edges_row<uint16_t>,
                                                     &edges_row<uint32_t>, &edges_row<uint64_t>};

}  // namespace p2pfast::P2PFAST_LEVEL
