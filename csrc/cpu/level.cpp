#include "cpu/level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/processor.h"

namespace p2pfast {
namespace {

constexpr const char* kNames[kLevels] = {"baseline", "avx2", "avx512", "avx512_bf16"};
constexpr int kUnset = -1;

std::atomic<int> active{kUnset};

// `source` says where the name came from, as the user wrote it.
Level checked(const std::string& name, const std::string& source) {
  for (int i = 0; i < kLevels; ++i) {
    if (name != kNames[i]) continue;
    const Level level = static_cast<Level>(i);
    const std::string missing = missing_for(level);
    if (!missing.empty()) {
      throw std::runtime_error(source + ": this machine cannot run that level, it lacks " + missing +
                               "; the highest it can run is " + level_name(supported_level()));
    }
    return level;
  }
  throw std::runtime_error(
      source + ": unknown instruction-set level; choose one of baseline, avx2, avx512, avx512_bf16");
}

}  // namespace

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }

Level supported_level() {
  int best = 0;
  while (best + 1 < kLevels && missing_for(static_cast<Level>(best + 1)).empty()) ++best;
  return static_cast<Level>(best);
}

Level active_level() {
  const int known = active.load(std::memory_order_relaxed);
  if (known != kUnset) return static_cast<Level>(known);
  const char* wanted = std::getenv("P2PFAST_CPU");
  const Level level = wanted == nullptr || *wanted == '\0'
                          ? supported_level()
                          : checked(wanted, std::string("P2PFAST_CPU=") + wanted);
  // If set_active_level ran meanwhile on another thread, its choice stands.
  int expected = kUnset;
  active.compare_exchange_strong(expected, static_cast<int>(level), std::memory_order_relaxed);
  return static_cast<Level>(active.load(std::memory_order_relaxed));
}

bool multiplies_pairs() {
#ifdef P2PFAST_EMULATE_WIDE
  return false;
#else
  return active_level() == Level::kAvx512Bf16;
#endif
}

void set_active_level(const char* name) {
  const Level level = checked(name, std::string("set_active_level(\"") + name + "\")");
  active.store(static_cast<int>(level), std::memory_order_relaxed);
}

}  // namespace p2pfast
