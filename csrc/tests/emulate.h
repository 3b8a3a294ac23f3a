// Runs the CUDA kernels (csrc/cuda/phases.h) on the host: every block, phase by phase, every thread in turn.
// What it cannot show is what threads do to each other between two barriers; running them forwards and
// backwards shows where it matters.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "cuda/phases.h"

namespace p2pfast::testing {

template <class K, int kPhase = 0>
void emulate_phases(const typename K::Args& args, int64_t block, bool backwards, typename K::Shared& shared,
                    std::vector<typename K::Local>& locals) {
  for (int i = 0; i < K::kThreads; ++i) {
    const int thread = backwards ? K::kThreads - 1 - i : i;
    K::template run<kPhase>(args, block, thread, shared, locals[static_cast<size_t>(thread)]);
  }
  if constexpr (kPhase + 1 < K::kPhases)
    emulate_phases<K, kPhase + 1>(args, block, backwards, shared, locals);
}

// Blocks [first, end) only. Shared memory starts out as NaN, as it may on a device.
template <class K>
void emulate_blocks(const typename K::Args& args, int64_t first, int64_t end, bool backwards = false) {
  const auto shared = std::make_unique<typename K::Shared>();
  std::vector<typename K::Local> locals(K::kThreads);
  for (int64_t i = 0; i < end - first; ++i) {
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(typename K::Shared));
    emulate_phases<K>(args, backwards ? end - 1 - i : first + i, backwards, *shared, locals);
  }
}

template <class K>
void emulate(const typename K::Args& args, int64_t blocks, bool backwards = false) {
  emulate_blocks<K>(args, 0, blocks, backwards);
}

}  // namespace p2pfast::testing
