#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "testing.h"

namespace {

// Every task exactly once, every worker in range.
bool all_tasks_run_once(int64_t tasks) {
  const int threads = p2pfast::num_threads();  // of this thread; a worker's own setting is another
  std::vector<std::atomic<int>> seen(static_cast<size_t>(tasks));
  std::atomic<bool> in_range{true};
  p2pfast::parallel_for(tasks, [&](int64_t task, int worker) {
    seen[static_cast<size_t>(task)].fetch_add(1);
    if (worker < 0 || worker >= threads) in_range = false;
  });
  for (const auto& count : seen) {
    if (count.load() != 1) return false;
  }
  return in_range;
}

TEST(parallel_runs_every_task_once) {
  for (const int threads : {1, 2, 3, 8}) {
    p2pfast::set_num_threads(threads);
    for (const int64_t tasks : {0, 1, 2, 7, 1000}) CHECK(all_tasks_run_once(tasks));
  }
  p2pfast::set_num_threads(2);
}

TEST(parallel_rethrows_the_first_exception_and_stays_usable) {
  for (const int threads : {1, 2, 4}) {
    p2pfast::set_num_threads(threads);
    for (int repeat = 0; repeat < 20; ++repeat) {
      CHECK_THROWS(p2pfast::parallel_for(100,
                                         [](int64_t task, int) {
                                           if (task == 37) throw std::runtime_error("task 37");
                                         }),
                   std::runtime_error, "task 37");
      CHECK(all_tasks_run_once(50));
    }
  }
  p2pfast::set_num_threads(2);
}

TEST(parallel_many_short_calls) {
  p2pfast::set_num_threads(2);
  std::atomic<int64_t> sum{0};
  for (int call = 0; call < 5000; ++call) {
    p2pfast::parallel_for(4, [&](int64_t task, int) { sum.fetch_add(task, std::memory_order_relaxed); });
  }
  CHECK(sum.load() == 5000 * 6);
}

TEST(parallel_wakes_sleeping_workers) {
  p2pfast::set_num_threads(2);
  for (int call = 0; call < 20; ++call) {
    CHECK(all_tasks_run_once(16));
    usleep(2000);  // longer than the workers spin
  }
}

// Several threads of a program each run their own plan.
TEST(parallel_from_several_threads) {
  std::vector<std::thread> callers;
  std::atomic<int> good{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      p2pfast::set_num_threads(1 + caller);
      bool fine = true;
      for (int call = 0; call < 200; ++call) fine = all_tasks_run_once(20) && fine;
      if (fine && p2pfast::num_threads() == 1 + caller) good.fetch_add(1);
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(good.load() == 4);
}

// A body that starts a thread of its own which runs parallel_for: pools are per calling thread.
TEST(parallel_inside_a_thread_started_by_a_task) {
  p2pfast::set_num_threads(2);
  std::atomic<int64_t> sum{0};
  p2pfast::parallel_for(4, [&](int64_t, int) {
    std::thread inner([&] {
      p2pfast::set_num_threads(2);
      p2pfast::parallel_for(10, [&](int64_t task, int) { sum.fetch_add(task); });
    });
    inner.join();
  });
  CHECK(sum.load() == 4 * 45);
}

// DataLoader workers are forked from a process whose pool exists already.
TEST(parallel_after_fork) {
  p2pfast::set_num_threads(3);
  CHECK(all_tasks_run_once(100));
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang in the child ends it by a signal
    _exit(all_tasks_run_once(100) && all_tasks_run_once(3) ? 0 : 1);
  }
  CHECK(child > 0);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(all_tasks_run_once(100));
  p2pfast::set_num_threads(2);
}

TEST(parallel_at_least_one_thread) {
  p2pfast::set_num_threads(-5);
  CHECK(p2pfast::num_threads() == 1);
  CHECK(all_tasks_run_once(5));
  p2pfast::set_num_threads(2);
}

}  // namespace
