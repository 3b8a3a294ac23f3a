#include "cpu/channels_last.h"

#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int64_t kTaskPixels = 1024;

// kLanes channels of up to kLanes pixels; from is the first channel's first pixel, to that of the result.
template <class From, class To>
P2PFAST_INLINE void turn(const ChannelsLast& a, const From* from, int pixels, int channels, To* to) {
  Vec v[kLanes];
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c) {
    const From* const line = from + c * a.channel_stride;
    v[c] = c >= channels ? Vec{} : pixels == kLanes ? load(line) : load_some(line, pixels);
  }
  transpose(v);
#pragma GCC unroll 16
  for (int x = 0; x < kLanes; ++x) {
    if (x >= pixels) break;
    if (channels == kLanes) {
      store(to + x * a.channels, v[x]);
    } else {
      store_some(to + x * a.channels, v[x], channels);
    }
  }
}

// Pixels that follow each other in every plane. Where there are channels for whole vectors, the last one
// begins early enough to be whole, and some channels are written twice.
template <class From, class To>
void turn_run(const ChannelsLast& a, const From* from, int64_t pixels, To* to) {
  for (int64_t x = 0; x < pixels; x += kLanes) {
    const int some = static_cast<int>(min2<int64_t>(kLanes, pixels - x));
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      const int64_t first = a.channels < kLanes ? 0 : min2(c, a.channels - kLanes);
      const int count = static_cast<int>(min2<int64_t>(kLanes, a.channels));
      turn(a, from + first * a.channel_stride + x, some, count, to + x * a.channels + first);
    }
  }
}

template <class From, class To>
void convert(const ChannelsLast& a) {
  // Rows that lie one after the other are one.
  const bool dense = a.row_stride == a.width;
  const int64_t rows = dense ? 1 : a.height, width = dense ? a.height * a.width : a.width;
  const int64_t parts = ceil_div(width, kTaskPixels);
  parallel_for(a.images * rows * parts, [&](int64_t task, int) {
    const int64_t x = task % parts * kTaskPixels, y = task / parts % rows, image = task / parts / rows;
    const From* const from = static_cast<const From*>(a.data) + image * a.image_stride + y * a.row_stride + x;
    To* const to = static_cast<To*>(a.out) + ((image * rows + y) * width + x) * a.channels;
    turn_run(a, from, min2(kTaskPixels, width - x), to);
  });
}

void run(const ChannelsLast& a) {
  const bool narrow = a.out_dtype == DType::kBFloat16;
  if (a.dtype == DType::kFloat32) {
    narrow ? convert<float, bf16>(a) : convert<float, float>(a);
  } else {
    narrow ? convert<bf16, bf16>(a) : convert<bf16, float>(a);
  }
}

}  // namespace

const ChannelsLastKernels channels_last_kernels = {run};

}  // namespace p2pfast::P2PFAST_LEVEL
