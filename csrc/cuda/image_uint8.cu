#include "cuda/image_uint8.h"
#include "cuda/image_uint8_kernel.h"
#include "cuda/launch.h"

namespace p2pfast::cuda {

void image_uint8(const ImageUint8& args, int device, uintptr_t stream) {
  constexpr const char* kName = "image_uint8";
  p2pfast::check(args);
  check_device(device, kName);
  if (args.images == 0 || args.height == 0 || args.width == 0) return;
  check_aligned(reinterpret_cast<uintptr_t>(args.data), args.type == PixelType::kFloat32 ? 4 : 2, kName,
                "data");
  with_image_uint8_kernel(args, [&]<class Kernel>(const typename Kernel::Args& call) {
    const int64_t blocks = Kernel::blocks(call);
    check_blocks(blocks, kName, "split the batch");
    const DeviceGuard guard(device, kName);
    launch<Kernel>(call, blocks, stream, kName);
  });
}

}  // namespace p2pfast::cuda
