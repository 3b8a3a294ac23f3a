// Just enough of a test framework: TEST(name) { ... } registers a case, CHECK(condition) records a
// failure and goes on, CHECK_THROWS(expression, Exception, "part of its message").
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/level.h"

namespace p2pfast::testing {

struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case>& cases();
void fail(const char* file, int line, const std::string& what);

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

// Runs `body` at every level this machine has (and this build emulates), then restores the active one.
void at_every_level(const std::function<void(const char* level)>& body);

// A small deterministic generator: the same numbers on every machine and library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  int64_t below(int64_t n) { return next() % n; }
  float uniform() { return static_cast<float>(next()) * (1.0f / 2147483648.0f); }  // [0, 1)

 private:
  uint64_t state_;
};

}  // namespace p2pfast::testing

#define TEST(name)                                                                      \
  static void test_##name();                                                            \
  static const p2pfast::testing::Registration registration_##name(#name, &test_##name); \
  static void test_##name()

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) p2pfast::testing::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_THROWS(expression, Exception, part)                                                      \
  do {                                                                                                 \
    bool thrown = false;                                                                               \
    try {                                                                                              \
      (void)(expression);                                                                              \
    } catch (const Exception& error) {                                                                 \
      thrown = true;                                                                                   \
      if (std::string(error.what()).find(part) == std::string::npos) {                                 \
        p2pfast::testing::fail(__FILE__, __LINE__, std::string("message: ") + error.what());           \
      }                                                                                                \
    }                                                                                                  \
    if (!thrown) p2pfast::testing::fail(__FILE__, __LINE__, #expression " did not throw " #Exception); \
  } while (false)
