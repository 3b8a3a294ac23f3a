// Runs the cases whose name contains the first argument, or all of them.
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>

#include "cpu/processor.h"
#include "testing.h"

namespace p2pfast::testing {
namespace {

std::mutex mutex;
int failures = 0;

}  // namespace

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void fail(const char* file, int line, const std::string& what) {
  const std::lock_guard lock(mutex);
  ++failures;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

void at_every_level(const std::function<void(const char* level)>& body) {
  const Level before = active_level();
  for (int i = 0; i < kLevels; ++i) {
    const Level level = static_cast<Level>(i);
    if (!compiled(level) || !missing_for(level).empty()) continue;
    set_active_level(level_name(level));
    body(level_name(level));
  }
  set_active_level(level_name(before));
}

}  // namespace p2pfast::testing

int main(int argc, char** argv) {
  using namespace p2pfast::testing;
  int run = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    ++run;
    const int before = failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("exception: ") + error.what());
    }
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", test.name);
  }
  std::printf("%d cases, %d failures\n", run, failures);
  return failures == 0 && run > 0 ? 0 : 1;
}
