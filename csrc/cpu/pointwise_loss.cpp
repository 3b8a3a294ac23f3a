#include "cpu/pointwise_loss.h"

#include <stdexcept>
#include <string>

namespace p2pfast {
namespace {

void require(bool good, const char* member, int64_t value, const char* remedy) {
  if (!good)
    throw std::invalid_argument(std::string("pointwise_loss: ") + member + " is " + std::to_string(value) +
                                "; " + remedy);
}

}  // namespace

void check_pointwise_loss(Loss loss, const std::vector<LossPart>& parts) {
  const int kind = static_cast<int>(loss);
  require(kind >= 0 && kind < kLosses, "loss", kind, "it must be from 0 to 5");
  const bool pair = loss == Loss::kAbsoluteDifference || loss == Loss::kSquaredDifference;
  for (const LossPart& part : parts) {
    const int type = static_cast<int>(part.type);
    require(type >= 0 && type <= 2, "type", type, "it must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    const int b_type = static_cast<int>(part.b_type);
    require(!pair || b_type == type || b_type == 0, "b_type", b_type, "it must be as type or 0 (float32)");
    require(part.count >= 0, "count", part.count, "it must not be negative");
    if (part.count > 0 && (!part.a || (pair && !part.b)))
      throw std::invalid_argument("pointwise_loss: a or b is null");
  }
}

double pointwise_loss(Loss loss, float target, std::vector<LossPart> parts) {
  check_pointwise_loss(loss, parts);
  int64_t chunks = 0;
  for (LossPart& part : parts) {
    part.first_chunk = chunks;
    chunks += (part.count + kLossChunk - 1) / kLossChunk;
  }
  std::vector<double> sums(static_cast<size_t>(chunks));
  if (chunks > 0)
    loss_kernels().run({loss, target, parts.data(), static_cast<int64_t>(parts.size()), chunks, sums.data()});
  double total = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const int64_t end = p + 1 < parts.size() ? parts[p + 1].first_chunk : chunks;
    double sum = 0;
    for (int64_t c = parts[p].first_chunk; c < end; ++c) sum += sums[static_cast<size_t>(c)];
    total += parts[p].weight * sum;
  }
  return total;
}

}  // namespace p2pfast
