// Kernels as phases between barriers. A phase is a function of one thread that also compiles for the host, so
// that csrc/tests/emulate.h runs whole grids, thread by thread, on a machine without a GPU.
//
// A kernel K has
//   struct Args                       plain data, at most 4 KB: passed by value
//   struct Shared                     what a block shares
//   struct Local                      what a thread keeps from phase to phase
//   static constexpr int kThreads, kPhases
//   static constexpr int kResident    blocks that a multiprocessor is to hold, which bounds registers
//   template <int kPhase>
//   static void run(const Args&, int64_t block, int thread, Shared&, Local&)
// and there is a barrier after every phase but the last. Grids have one dimension.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define P2PFAST_HD __host__ __device__ __forceinline__
#else
#define P2PFAST_HD inline
#endif

#ifdef __CUDA_ARCH__
#define P2PFAST_UNROLL _Pragma("unroll")
#else
#define P2PFAST_UNROLL
#endif

namespace p2pfast::cuda {

template <class T>
P2PFAST_HD T min2(T a, T b) {
  return a < b ? a : b;
}

template <class T>
P2PFAST_HD T max2(T a, T b) {
  return a < b ? b : a;
}

P2PFAST_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace p2pfast::cuda
