// Carves aligned pieces from a workspace; with a null base it only measures.
#pragma once

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

struct Carver {
  char* base;
  int64_t used = 0;
  float* floats(int64_t n) {
    float* p = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(used));
    used += round_up(n * 4, 64);
    return p;
  }
};

}  // namespace p2pfast::P2PFAST_LEVEL
