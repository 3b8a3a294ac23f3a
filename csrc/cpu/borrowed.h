// Running on another library's threads. PyTorch's OpenMP workers go on spinning for milliseconds after each
// of its operations, so between two of them a pool of our own would have to share the processor with them.
#pragma once

namespace p2pfast {

// GOMP_parallel of the OpenMP library: runs `body` on `threads` threads at once and waits for them.
using ParallelRegion = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

// The region to run on, or null; for the whole process. A child after fork() does not use it.
void set_parallel_region(ParallelRegion region);

// Whether run_parallel() calls of this thread use it, where there is one.
void borrow_threads(bool wanted);

}  // namespace p2pfast
