// Losses that are weighted sums over the values of several tensors, with their gradients, in one pass.
// The order of summation is fixed: a thousand values in float32, the rest in float64.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/level.h"

namespace p2pfast {

enum class ValueType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Loss : int32_t {
  kLogistic = 0,            // log(1 + exp(a)) - target * a
  kSquare = 1,              // (a - target)^2
  kHinge = 2,               // max(0, 1 - target * a)
  kLinear = 3,              // target * a
  kAbsoluteDifference = 4,  // |a - b|
  kSquaredDifference = 5,   // (a - b)^2
};
inline constexpr int kLosses = 6;
inline constexpr int64_t kLossChunk = 8192;

// `count` values side by side in each array; the gradient is of a's type.
struct LossPart {
  const void* a;
  const void* b;   // of the losses of two tensors: of a's type or float32
  void* gradient;  // with respect to a, times gradient_weight; or null
  int64_t count;
  ValueType type, b_type;
  float weight, gradient_weight;
  int64_t first_chunk;  // set by pointwise_loss()
};

struct LossArgs {
  Loss loss;
  float target;
  const LossPart* parts;
  int64_t count, chunks;
  double* sums;  // of the chunks, without weights
};

struct LossKernels {
  void (*run)(const LossArgs& args);
};

P2PFAST_PER_LEVEL(LossKernels, loss_kernels)

// Throws std::invalid_argument naming what is wrong. Shared by the CPU and CUDA kernels.
void check_pointwise_loss(Loss loss, const std::vector<LossPart>& parts);

// The sum of weight * loss over all values of all parts; writes the gradients that are wanted. Runs on
// the calling thread's pool. Throws as check_pointwise_loss() does.
double pointwise_loss(Loss loss, float target, std::vector<LossPart> parts);

}  // namespace p2pfast
