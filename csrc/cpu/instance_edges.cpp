#include "cpu/instance_edges.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"

namespace p2pfast {

void check(const InstanceEdges& args) {
  const auto fail = [](const std::string& what) { throw std::invalid_argument("instance_edges: " + what); };
  const auto size = [&](const char* name, int64_t value) {
    if (value < 0) fail(std::string(name) + " is " + std::to_string(value) + "; it must not be negative");
  };
  size("images", args.images);
  size("height", args.height);
  size("width", args.width);
  const int bytes = args.element_size;
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) {
    fail("element_size is " + std::to_string(bytes) + "; ids of 1, 2, 4 or 8 bytes are supported");
  }
  int64_t pixels = 0;
  if (__builtin_mul_overflow(args.images, args.height, &pixels) ||
      __builtin_mul_overflow(pixels, args.width, &pixels) || pixels > INT64_MAX / 8) {
    fail("images * height * width does not fit into 64 bits");
  }
  if (pixels == 0) return;
  if (args.ids == nullptr) fail("ids is a null pointer");
  if (args.edges == nullptr) fail("edges is a null pointer");
  if (reinterpret_cast<uintptr_t>(args.ids) % static_cast<uintptr_t>(bytes) != 0) {
    fail("ids is not aligned to its element size of " + std::to_string(bytes) + " bytes");
  }
}

void instance_edges(const InstanceEdges& args) {
  check(args);
  if (args.images == 0 || args.height == 0 || args.width == 0) return;
  const InstanceEdgesKernels& kernels = instance_edges_kernels();
  const auto row_kernel = args.element_size == 1   ? kernels.row8
                          : args.element_size == 2 ? kernels.row16
                          : args.element_size == 4 ? kernels.row32
                                                   : kernels.row64;
  const char* const ids = static_cast<const char*>(args.ids);
  const int64_t image_bytes = args.image_stride * args.element_size;
  const int64_t row_bytes = args.row_stride * args.element_size;
  // About 64 K pixels a task: enough work to pay for handing it out, and the three rows stay in L1/L2.
  const int64_t band = std::clamp<int64_t>(65536 / args.width, 1, args.height);
  const int64_t bands = (args.height + band - 1) / band;
  parallel_for(args.images * bands, [&](int64_t task, int) {
    const int64_t image = task / bands;
    const int64_t first = task % bands * band;
    const int64_t last = std::min(first + band, args.height);
    const char* const base = ids + image * image_bytes;
    uint8_t* const out = args.edges + image * args.height * args.width;
    for (int64_t y = first; y < last; ++y) {
      const char* const row = base + y * row_bytes;
      row_kernel(y == 0 ? row : row - row_bytes, row, y + 1 == args.height ? row : row + row_bytes,
                 out + y * args.width, args.width);
    }
  });
}

}  // namespace p2pfast
