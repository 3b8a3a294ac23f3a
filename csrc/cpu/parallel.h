// A small thread pool without OpenMP: each calling thread has workers of its own, so several Python
// threads can run different plans at once, and a child after fork() starts fresh ones.
#pragma once

#include <cstdint>
#include <type_traits>

namespace p2pfast {

// Threads a parallel_for of this thread may use, the caller included. The Python side sets it to
// torch.get_num_threads() before a call.
int num_threads();
void set_num_threads(int threads);

// Calls body(context, task, worker) for every task in [0, tasks); worker is in [0, num_threads()).
// Tasks are handed out in order, dynamically. Not re-entrant: a body must not call it. The first
// exception thrown by a body is rethrown here after all workers have stopped.
void run_parallel(int64_t tasks, void (*body)(void* context, int64_t task, int worker), void* context);

}  // namespace p2pfast

#ifdef P2PFAST_LEVEL
namespace p2pfast::P2PFAST_LEVEL {
#else
namespace p2pfast {
#endif

template <class F>
void parallel_for(int64_t tasks, F&& f) {
  using Body = F;
  p2pfast::run_parallel(
      tasks,
      [](void* context, int64_t task, int worker) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(task, worker);
      },
      &f);
}

}  // namespace p2pfast
