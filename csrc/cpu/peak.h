// What the matrix kernel reaches while its operands stay in the L1 cache: the speed that others are a share
// of.
#pragma once

#include "cpu/level.h"

namespace p2pfast {

struct PeakKernels {
  // Runs on every thread; the multiplications that were done. `rounds` lengthens it.
  double (*run)(int rounds);
  double (*run_pairs)(int rounds);  // of bfloat16 pairs
};

P2PFAST_PER_LEVEL(PeakKernels, peak_kernels)

}  // namespace p2pfast
