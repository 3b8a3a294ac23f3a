// csrc/cpu/image_uint8.h on an NVIDIA GPU.
#pragma once

#include <cstdint>

#include "cpu/image_uint8.h"

namespace p2pfast::cuda {

// Addresses are on `device`; `stream` is a cudaStream_t (torch's `cuda_stream`), 0 the default one.
// Returns before the work is done. Throws std::invalid_argument as the CPU kernel does, and
// std::runtime_error with CUDA's own message if the launch fails.
void image_uint8(const ImageUint8& args, int device, uintptr_t stream);

}  // namespace p2pfast::cuda
