// Statistics of parts put together.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

// Chan's update in float64. Parts are added in a fixed order: the same answer at any number of threads.
struct Merged {
  double count = 0, mean = 0, m2 = 0;
  void add(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double total = count + n, delta = other_mean - mean;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * n / total);
    count = total;
  }
};

}  // namespace p2pfast::P2PFAST_LEVEL
