// csrc/cpu/pointwise_loss.h on an NVIDIA GPU: one launch for up to 64 parts, whose addresses are passed by
// value, and a small one that adds up.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/pointwise_loss.h"

namespace p2pfast::cuda {

// `count` values side by side; to = from * factor, rounded once.
struct ScalePart {
  const void* from;
  void* to;
  int64_t count;
  float factor;
  ValueType type;
};

// float64 sums of workspace that the parts need, with weights; their order does not depend on the device.
int64_t pointwise_loss_sums(const std::vector<LossPart>& parts);

// Writes out[0], the sum of weight * loss over all values of all parts, and the gradients that are wanted.
// Addresses are on `device`; `workspace` holds pointwise_loss_sums() values; `stream` is a cudaStream_t
// (torch's `cuda_stream`), 0 the default one. Returns before the work is done. Throws std::invalid_argument
// as the CPU kernel does, and std::runtime_error with CUDA's own message if a launch fails.
void pointwise_loss(Loss loss, float target, const std::vector<LossPart>& parts, double* workspace,
                    float* out, int device, uintptr_t stream);

// Multiplies by *factor as well, which is on the device; one launch for up to 64 parts. As above otherwise.
void pointwise_scale(const std::vector<ScalePart>& parts, const float* factor, int device, uintptr_t stream);

}  // namespace p2pfast::cuda
