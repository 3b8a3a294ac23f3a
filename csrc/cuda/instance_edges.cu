#include "cuda/instance_edges.h"
#include "cuda/instance_edges_kernel.h"
#include "cuda/launch.h"

namespace p2pfast::cuda {

void instance_edges(const InstanceEdges& args, int device, uintptr_t stream) {
  constexpr const char* kName = "instance_edges";
  p2pfast::check(args);
  check_device(device, kName);
  if (args.images == 0 || args.height == 0 || args.width == 0) return;
  run_instance_edges(args, [&]<class Kernel>(const typename Kernel::Args& call, int64_t blocks) {
    check_blocks(blocks, kName, "split the batch");
    const DeviceGuard guard(device, kName);
    launch<Kernel>(call, blocks, stream, kName);
  });
}

}  // namespace p2pfast::cuda
