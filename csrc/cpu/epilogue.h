// What every convolution does with finished output values: bias, statistics, activation, store.
#pragma once

#include "cpu/conv.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int64_t kStreamedBytes = int64_t{16} << 20;

inline int stats_stride(const ConvArgs& args) { return static_cast<int>(round_up(args.out_channels, 16)); }

// Sums of one vector of channels, shifted by the first value seen: free of the cancellation that
// E[x^2] - E[x]^2 suffers on data far from zero. settle(), called now and then, moves the shift to the
// mean so far, for data whose first value is unlike the others.
struct Moments {
  Vec shift = {}, sum = {}, squares = {};
  int64_t count = 0, next = 8;

  P2PFAST_INLINE void add(Vec v) {
    if (count == 0) shift = v;
    const Vec d = v - shift;
    sum += d;
    squares += d * d;
    ++count;
  }
  // n values at once, summed against `from`, which is the shift unless these are the first.
  P2PFAST_INLINE void add_sums(Vec from, Vec more, Vec more_squares, int n) {
    shift = from;
    sum += more;
    squares += more_squares;
    count += n;
    settle();
  }
  P2PFAST_INLINE void settle() {
    if (count < next) return;
    next = 4 * count;
    const Vec average = sum / static_cast<float>(count);
    squares -= sum * average;
    shift += average;
    sum = Vec{};
  }
  P2PFAST_INLINE void write(float* mean, float* m2) const {
    const Vec average = sum / static_cast<float>(count);
    const Vec spread = squares - sum * average;
    store(mean, shift + average);
    store(m2, spread < 0.0f ? Vec{} : spread);
  }
};

// Whether an output is too large to stay in a cache until it is read, and laid out for whole lines.
inline bool streams(const ConvArgs& args) {
  const int64_t size = args.out.dtype == DType::kFloat32 ? 4 : 2, line = 64 / size;
  return kCanStream && size * args.images * args.out.image_stride > kStreamedBytes &&
         args.out.pixel_stride % line == 0 && args.out.row_stride % line == 0 &&
         args.out.image_stride % line == 0 && reinterpret_cast<uintptr_t>(args.out.data) % 64 == 0;
}
inline float finish_scalar(float v, Act act, float slope) {
  switch (act) {
    case Act::kElu:
      return v > 0.0f ? v : slope * __builtin_expm1f(v);
    case Act::kGelu:
      return 0.5f * v * (1.0f + __builtin_erff(v * 0.70710678f));
    default:
      return v;
  }
}

P2PFAST_INLINE Vec finish(Vec v, Act act, float slope) {
  if (act == Act::kNone) return v;
  if (act == Act::kRelu) return v < 0.0f ? Vec{} : v;
  if (act == Act::kLeaky) return leaky(v, splat(slope));
  if (act == Act::kTanh) return tanh_vec(v);
  if (act == Act::kSigmoid) return sigmoid_vec(v);
  if (act == Act::kSilu) return v * sigmoid_vec(v);
  for (int i = 0; i < kLanes; ++i) v[i] = finish_scalar(v[i], act, slope);
  return v;
}

// The same where every value of a tile is code of its own: a call for what takes more than a few
// instructions.
__attribute__((noinline)) inline Vec finish_smooth(Vec v, Act act, float slope) {
  return finish(v, act, slope);
}
P2PFAST_INLINE Vec finish_in_tile(Vec v, Act act, float slope) {
  if (act == Act::kNone) return v;
  if (act == Act::kRelu) return v < 0.0f ? Vec{} : v;
  if (act == Act::kLeaky) return leaky(v, splat(slope));
  return finish_smooth(v, act, slope);
}

// One vector of channels [c, c + kLanes) of an output pixel. Channels past the last are zero, as
// weights and bias are there.
template <class T>
P2PFAST_INLINE void put_vector(const ConvArgs& args, T* pixel, int c, Vec v) {
  if (args.out.channel_stride == 1 && c + kLanes <= args.out.pixel_stride) {
    store(pixel + c, v);
  } else {
    for (int i = 0; i < kLanes && c + i < args.out_channels; ++i)
      put(pixel + (c + i) * args.out.channel_stride, v[i]);
  }
}

}  // namespace p2pfast::P2PFAST_LEVEL
