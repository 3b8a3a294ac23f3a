#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/level.h"
#include "cpu/processor.h"
#include "testing.h"

namespace {

using p2pfast::Level;

TEST(level_names_and_order) {
  CHECK(std::string(p2pfast::level_name(Level::kBaseline)) == "baseline");
  CHECK(std::string(p2pfast::level_name(Level::kAvx512Bf16)) == "avx512_bf16");
  CHECK(p2pfast::missing_for(Level::kBaseline).empty());
  CHECK(p2pfast::missing_for(p2pfast::supported_level()).empty());
}

// A level includes the ones below, so a machine that runs one runs those.
TEST(level_support_is_monotonic) {
  bool supported = true;
  for (int i = 0; i < p2pfast::kLevels; ++i) {
    const bool now = p2pfast::missing_for(static_cast<Level>(i)).empty();
    CHECK(supported || !now);
    supported = now;
  }
}

TEST(level_switching) {
  p2pfast::testing::at_every_level(
      [](const char* level) { CHECK(std::string(p2pfast::level_name(p2pfast::active_level())) == level); });
}

TEST(level_errors_name_the_remedy) {
  const Level before = p2pfast::active_level();
  CHECK_THROWS(p2pfast::set_active_level("sse9"), std::runtime_error, "baseline, avx2, avx512, avx512_bf16");
  CHECK_THROWS(p2pfast::set_active_level(""), std::runtime_error, "unknown");
  for (int i = 0; i < p2pfast::kLevels; ++i) {
    const Level level = static_cast<Level>(i);
    const std::string missing = p2pfast::missing_for(level);
    if (missing.empty()) continue;
    CHECK_THROWS(p2pfast::set_active_level(p2pfast::level_name(level)), std::runtime_error,
                 "lacks " + missing);
  }
  CHECK(p2pfast::active_level() == before);
}

TEST(level_from_many_threads) {
  const Level before = p2pfast::active_level();
  p2pfast::set_active_level("baseline");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 1000; ++i) {
        if (i % 2 == 0) p2pfast::set_active_level("baseline");
        CHECK(p2pfast::active_level() == Level::kBaseline);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  p2pfast::set_active_level(p2pfast::level_name(before));
}

}  // namespace
