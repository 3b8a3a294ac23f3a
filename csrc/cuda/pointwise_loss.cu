#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/pointwise_loss.h"
#include "cuda/pointwise_loss_kernel.h"

namespace p2pfast::cuda {
namespace {

constexpr const char* kName = "pointwise_loss";

void check_part(Loss loss, const LossPart& part) {
  if (part.count == 0) return;
  const size_t bytes = part.type == ValueType::kFloat32 ? 4 : 2;
  const size_t b_bytes = part.b_type == ValueType::kFloat32 ? 4 : 2;
  check_aligned(reinterpret_cast<uintptr_t>(part.a), bytes, kName, "a");
  check_aligned(reinterpret_cast<uintptr_t>(part.gradient), bytes, kName, "gradient");
  if (has_two(loss)) check_aligned(reinterpret_cast<uintptr_t>(part.b), b_bytes, kName, "b");
  check_blocks(ceil_div(part.count, kLossChunk), kName, "split the tensor");
}

}  // namespace

int64_t pointwise_loss_sums(const std::vector<LossPart>& parts) {
  int64_t chunks = 0;
  for (const LossPart& part : parts) chunks += ceil_div(part.count, kLossChunk);
  return chunks;
}

void pointwise_loss(Loss loss, float target, const std::vector<LossPart>& parts, double* workspace,
                    float* out, int device, uintptr_t stream) {
  check_pointwise_loss(loss, parts);
  check_device(device, kName);
  for (const LossPart& part : parts) check_part(loss, part);
  if (out == nullptr) throw std::invalid_argument("pointwise_loss: out is null");
  check_aligned(reinterpret_cast<uintptr_t>(out), sizeof(float), kName, "out");
  if (workspace == nullptr && pointwise_loss_sums(parts) > 0)
    throw std::invalid_argument("pointwise_loss: workspace is null");
  check_aligned(reinterpret_cast<uintptr_t>(workspace), sizeof(double), kName, "workspace");
  const DeviceGuard guard(device, kName);
  run_pointwise_loss(loss, target, parts, workspace, out,
                     [&]<class Kernel>(const typename Kernel::Args& args, int64_t blocks) {
                       launch<Kernel>(args, blocks, stream, kName);
                     });
}

void pointwise_scale(const std::vector<ScalePart>& parts, const float* factor, int device, uintptr_t stream) {
  constexpr const char* kScale = "pointwise_scale";
  check_device(device, kScale);
  for (const ScalePart& part : parts) {
    const int type = static_cast<int>(part.type);
    if (type < 0 || type > 2)
      throw std::invalid_argument("pointwise_scale: type is " + std::to_string(type) +
                                  "; it must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    if (part.count < 0)
      throw std::invalid_argument("pointwise_scale: count is " + std::to_string(part.count) +
                                  "; it must not be negative");
    if (part.count == 0) continue;
    if (part.from == nullptr || part.to == nullptr)
      throw std::invalid_argument("pointwise_scale: from or to is null");
    check_aligned(reinterpret_cast<uintptr_t>(part.from), type == 0 ? 4 : 2, kScale, "from");
    check_aligned(reinterpret_cast<uintptr_t>(part.to), type == 0 ? 4 : 2, kScale, "to");
    check_blocks(ceil_div(part.count, kLossChunk), kScale, "split the tensor");
  }
  if (factor == nullptr) throw std::invalid_argument("pointwise_scale: factor is null");
  check_aligned(reinterpret_cast<uintptr_t>(factor), sizeof(float), kScale, "factor");
  const DeviceGuard guard(device, kScale);
  run_pointwise_scale(parts, factor, [&]<class Kernel>(const typename Kernel::Args& args, int64_t blocks) {
    launch<Kernel>(args, blocks, stream, kScale);
  });
}

}  // namespace p2pfast::cuda
