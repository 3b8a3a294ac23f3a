#include <stdexcept>
#include <string>

#include "cuda/instance_pool.h"
#include "cuda/instance_pool_kernel.h"
#include "cuda/launch.h"

namespace p2pfast::cuda {
namespace {

constexpr const char* kName = "instance_pool";

void require(bool good, const char* member, int64_t value, const char* remedy) {
  if (!good)
    throw std::invalid_argument(std::string("instance_pool: ") + member + " is " + std::to_string(value) +
                                "; " + remedy);
}

void check_buffer(const void* address, size_t bytes, const char* name) {
  if (address == nullptr) throw std::invalid_argument(std::string("instance_pool: ") + name + " is null");
  check_aligned(reinterpret_cast<uintptr_t>(address), bytes, kName, name);
}

void check_pool(const InstancePool& a) {
  require(a.type >= 0 && a.type <= 2, "type", a.type, "it must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(a.images >= 0, "images", a.images, "it must not be negative");
  require(a.channels >= 0, "channels", a.channels, "it must not be negative");
  require(a.pixels >= 0, "pixels", a.pixels, "it must not be negative");
  int64_t elements;
  if (__builtin_mul_overflow(a.images, a.pixels, &elements) ||
      __builtin_mul_overflow(elements, a.channels, &elements) || elements > INT64_MAX / 8)
    throw std::invalid_argument("instance_pool: images * channels * pixels does not fit into 64 bits");
  if (elements == 0) return;
  require(a.regions >= 1 && a.regions <= a.images * a.pixels, "regions", a.regions,
          "it must be from 1 to images * pixels");
  require(a.chunks >= 1 && a.chunks <= a.images * a.pixels + a.regions, "chunks", a.chunks,
          "it must be from 1 to images * pixels + regions");
  const size_t bytes = a.type == 0 ? 4 : 2;
  check_buffer(a.features, bytes, "features");
  check_buffer(a.out, bytes, "out");
  check_buffer(a.region, 8, "region");
  check_buffer(a.order, 8, "order");
  check_buffer(a.start, 8, "start");
  check_buffer(a.first_chunk, 8, "first_chunk");
  check_buffer(a.partials, 8, "partials");
  check_buffer(a.means, 4, "means");
}

}  // namespace

void instance_pool(const InstancePool& args, int device, uintptr_t stream) {
  check_pool(args);
  check_device(device, kName);
  if (args.images == 0 || args.channels == 0 || args.pixels == 0) return;
  run_instance_pool(args, [&]<class Kernel>(const typename Kernel::Args&, int64_t blocks) {
    check_blocks(blocks, kName, "split the batch");
  });
  const DeviceGuard guard(device, kName);
  run_instance_pool(args, [&]<class Kernel>(const typename Kernel::Args& call, int64_t blocks) {
    launch<Kernel>(call, blocks, stream, kName);
  });
}

}  // namespace p2pfast::cuda
