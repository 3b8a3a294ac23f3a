// Launching a kernel of phases (phases.h).
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/phases.h"

namespace p2pfast::cuda {

inline constexpr int64_t kMaxBlocks = INT32_MAX;

inline void check_device(int device, const char* what) {
  if (device < 0)
    throw std::invalid_argument(std::string(what) + ": device is " + std::to_string(device) +
                                "; it must not be negative");
}

inline void check_blocks(int64_t blocks, const char* what, const char* remedy) {
  if (blocks > kMaxBlocks)
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(blocks) +
                                " thread blocks are more than CUDA starts at a time; " + remedy);
}

inline void check_aligned(uintptr_t address, size_t bytes, const char* what, const char* name) {
  if (address % bytes != 0)
    throw std::invalid_argument(std::string(what) + ": " + name + " is not aligned to its element size of " +
                                std::to_string(bytes) + " bytes");
}

template <class K, int kPhase = 0>
__device__ __forceinline__ void run_phases(const typename K::Args& args, typename K::Shared& shared,
                                           typename K::Local& local) {
  if constexpr (kPhase > 0) __syncthreads();
  K::template run<kPhase>(args, blockIdx.x, static_cast<int>(threadIdx.x), shared, local);
  if constexpr (kPhase + 1 < K::kPhases) run_phases<K, kPhase + 1>(args, shared, local);
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kResident)
    kernel(const __grid_constant__ typename K::Args args) {
  __shared__ typename K::Shared shared;
  typename K::Local local;
  run_phases<K>(args, shared, local);
}

// On the current device; does nothing for an empty grid.
template <class K>
void launch(const typename K::Args& args, int64_t blocks, uintptr_t stream, const char* what) {
  static_assert(sizeof(typename K::Args) <= 4096 && sizeof(typename K::Shared) <= 48 * 1024);
  if (blocks == 0) return;
  kernel<K><<<static_cast<unsigned>(blocks), K::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), what);
}

}  // namespace p2pfast::cuda
