// Input that a convolution will read, fetched into the L2 cache a few lines at a time between its products:
// the transforms would else wait for memory, which the products leave idle.
#pragma once

#include "cpu/conv.h"
#include "cpu/gather.h"

namespace p2pfast::P2PFAST_LEVEL {

class Ahead {
 public:
  // Columns [x0, x0 + columns) of row y of the padded input, as far as they exist.
  void add(const ConvArgs& args, int64_t image, int64_t y, int64_t x0, int64_t columns) {
    y = padded_index(y, args.height, args.pad);
    const int64_t begin = max2<int64_t>(0, x0), end = min2<int64_t>(args.width, x0 + columns);
    if (y < 0 || begin >= end) return;
    for (int i = 0; i < args.sources; ++i) {
      const Source& s = args.source[i];
      if (s.channel_stride != 1 || runs_ == kMost) continue;
      const int64_t size = s.dtype == DType::kFloat32 ? 4 : 2;
      const int64_t lines = ceil_div((end - begin) * s.pixel_stride * size, 64);
      run_[runs_++] = {static_cast<const char*>(s.data) +
                           size * (image * s.image_stride + y * s.row_stride + begin * s.pixel_stride),
                       lines};
      lines_ += lines;
    }
  }
  // `bytes` from there on.
  void add(const char* from, int64_t bytes) {
    if (runs_ == kMost) return;
    run_[runs_++] = {from, ceil_div(bytes, 64)};
    lines_ += run_[runs_ - 1].lines;
  }
  // fetch() will be called `calls` times; nothing is fetched where it is more than `most` lines, which would
  // push out what is in use.
  void share_among(int64_t calls, int64_t most) {
    if (lines_ > most) runs_ = 0;
    share_ = ceil_div(lines_, calls);
  }
  // Its share of the lines; what was added last comes first.
  __attribute__((noinline)) void fetch() {
    for (int64_t left = share_; left > 0 && runs_ > 0;) {
      Run& run = run_[runs_ - 1];
      const int64_t n = min2(left, run.lines);
      for (int64_t i = 0; i < n; ++i) __builtin_prefetch(run.at + 64 * i, 0, 2);
      run.at += 64 * n;
      run.lines -= n;
      left -= n;
      if (run.lines == 0) --runs_;
    }
  }

 private:
  static constexpr int kMost = 256;
  struct Run {
    const char* at;
    int64_t lines;
  };
  Run run_[kMost];
  int runs_ = 0;
  int64_t lines_ = 0, share_ = 0;
};

}  // namespace p2pfast::P2PFAST_LEVEL
