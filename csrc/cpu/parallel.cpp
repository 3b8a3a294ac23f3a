#include "cpu/parallel.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/borrowed.h"

namespace p2pfast {
namespace {

thread_local int wanted_threads = 0;
thread_local bool wants_borrowed = false;
std::atomic<ParallelRegion> region{nullptr};
std::atomic<pid_t> region_owner{0};

struct Job {
  int64_t tasks = 0;
  void (*body)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
};

inline void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), owner_(getpid()) {
    for (int w = 1; w < threads_; ++w) workers_.emplace_back([this, w] { serve(w); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }
  // After fork() only the calling thread exists in the child: the pool is unusable there.
  bool usable() const { return owner_ == getpid(); }

  void run(const Job& job) {
    if (threads_ == 1 || job.tasks <= 1) {
      for (int64_t task = 0; task < job.tasks; ++task) job.body(job.context, task, 0);
      return;
    }
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(threads_ - 1, std::memory_order_relaxed);
    failure_ = nullptr;
    {
      std::lock_guard lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // About 50 microseconds: plans call back to back, and a futex wake costs as much.
  static constexpr int kSpins = 2000;

  void work(int worker) {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= job_.tasks) return;
      try {
        job_.body(job_.context, task, worker);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_.store(job_.tasks, std::memory_order_relaxed);
      }
    }
  }

  void serve(int worker) {
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins)
        pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      work(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int threads_;
  const pid_t owner_;
  Job job_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<uint64_t> generation_{0};
  std::exception_ptr failure_;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// Holds a thread's pool; leaks it in a forked child, whose worker threads do not exist.
struct PoolHolder {
  std::unique_ptr<Pool> pool;
  ~PoolHolder() {
    if (pool && !pool->usable()) (void)pool.release();
  }
};

thread_local PoolHolder holder;

// A job on borrowed threads, however many of them come.
class Borrowed {
 public:
  explicit Borrowed(const Job& job) : job_(job) {}

  void run(ParallelRegion parallel, int threads) {
    parallel([](void* self) { static_cast<Borrowed*>(self)->work(); }, this, static_cast<unsigned>(threads),
             0);
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void work() {
    const int worker = workers_.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= job_.tasks) return;
      try {
        job_.body(job_.context, task, worker);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_.store(job_.tasks, std::memory_order_relaxed);
      }
    }
  }

  const Job& job_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> workers_{0};
  std::exception_ptr failure_;
  std::mutex mutex_;
};

int hardware_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

}  // namespace

int num_threads() { return wanted_threads > 0 ? wanted_threads : hardware_threads(); }

void set_num_threads(int threads) { wanted_threads = threads < 1 ? 1 : threads; }

void set_parallel_region(ParallelRegion wanted) {
  region_owner = getpid();
  region = wanted;
}

void borrow_threads(bool wanted) { wants_borrowed = wanted; }

void run_parallel(int64_t tasks, void (*body)(void*, int64_t, int), void* context) {
  const int threads = num_threads();
  const ParallelRegion parallel = region;
  if (wants_borrowed && parallel && threads > 1 && tasks > 1 && region_owner == getpid()) {
    const Job job{tasks, body, context};
    return Borrowed(job).run(parallel, threads);
  }
  if (holder.pool && !holder.pool->usable()) (void)holder.pool.release();
  if (!holder.pool || holder.pool->threads() != threads) {
    holder.pool.reset();
    holder.pool = std::make_unique<Pool>(threads);
  }
  holder.pool->run({tasks, body, context});
}

}  // namespace p2pfast
