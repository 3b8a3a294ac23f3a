// A pixel a thread. A row's neighbours come from L1, so memory sees each id about once; at
// 2048x1024 the launch itself takes most of the time.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/instance_edges.h"

namespace p2pfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

template <class T>
__global__ void __launch_bounds__(kThreads)
    edges_kernel(const T* __restrict__ ids, uint8_t* __restrict__ edges, int64_t images, int64_t height,
                 int64_t width, int64_t image_stride, int64_t row_stride) {
  const int64_t x = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (x >= width) return;
  for (int64_t line = blockIdx.y; line < images * height; line += gridDim.y) {
    const int64_t y = line % height;
    const T* const row = ids + line / height * image_stride + y * row_stride;
    const T id = row[x];
    bool edge = false;
    if (x > 0) edge |= id != row[x - 1];
    if (x + 1 < width) edge |= id != row[x + 1];
    if (y > 0) edge |= id != row[x - row_stride];
    if (y + 1 < height) edge |= id != row[x + row_stride];
    edges[line * width + x] = edge;
  }
}

template <class T>
void launch(const InstanceEdges& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.width + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min(args.images * args.height, kMaxGridY)));
  edges_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(args.ids), args.edges, args.images,
                                              args.height, args.width, args.image_stride, args.row_stride);
}

}  // namespace

void instance_edges(const InstanceEdges& args, int device, uintptr_t stream) {
  p2pfast::check(args);
  if (device < 0) {
    throw std::invalid_argument("instance_edges: device is " + std::to_string(device) +
                                "; it must not be negative");
  }
  // The grid's x dimension holds 2^31 - 1 blocks.
  if (args.width > int64_t{INT32_MAX} * kThreads) {
    throw std::invalid_argument("instance_edges: width is " + std::to_string(args.width) +
                                ", too large for CUDA");
  }
  if (args.images == 0 || args.height == 0 || args.width == 0) return;
  const DeviceGuard guard(device, "instance_edges");
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  switch (args.element_size) {
    case 1:
      launch<uint8_t>(args, cuda_stream);
      break;
    case 2:
      launch<uint16_t>(args, cuda_stream);
      break;
    case 4:
      launch<uint32_t>(args, cuda_stream);
      break;
    default:
      launch<uint64_t>(args, cuda_stream);
      break;
  }
  check(cudaGetLastError(), "instance_edges");
}

}  // namespace p2pfast::cuda
