// The prologue shared by all convolutions: copies a window of the (padded) input into a scratch of float32
// or bfloat16, applying each source's deferred normalisation and activation on the way.
#pragma once

#include "cpu/conv.h"
#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

// The input row or column that padded coordinate `i` reads, or -1 for a zero. Coordinates further
// out than the padding exist only under outputs that are thrown away.
inline int64_t padded_index(int64_t i, int64_t size, Pad pad) {
  if (i >= 0 && i < size) return i;
  if (pad == Pad::kZero) return -1;
  if (pad == Pad::kReplicate) return i < 0 ? 0 : size - 1;
  i = i < 0 ? -i : 2 * size - 2 - i;
  return i >= 0 && i < size ? i : -1;
}

template <Act kAct>
P2PFAST_INLINE Vec activate(Vec v, Vec slope) {
  if constexpr (kAct == Act::kRelu) return v < 0.0f ? Vec{} : v;
  if constexpr (kAct == Act::kLeaky) return leaky(v, slope);
  return v;
}

template <Act kAct>
P2PFAST_INLINE float activate(float v, float slope) {
  if constexpr (kAct == Act::kRelu) return v < 0.0f ? 0.0f : v;
  if constexpr (kAct == Act::kLeaky) return v < 0.0f ? v * slope : v;
  return v;
}

// Values that a gather may write past the last pixel.
inline constexpr int kGatherSlack = 16;

// Channels [c0, c0 + channels) of the concatenated sources, rows [y0, y0 + rows) and columns
// [x0, x0 + columns) of the padded input of image n, as float or bf16.
template <class To>
void gather(const ConvArgs& args, int64_t n, int64_t y0, int rows, int64_t x0, int columns, int c0,
            int channels, To* to, int64_t to_pixel, int64_t to_row);
extern template void gather(const ConvArgs& args, int64_t n, int64_t y0, int rows, int64_t x0, int columns,
                            int c0, int channels, float* to, int64_t to_pixel, int64_t to_row);
extern template void gather(const ConvArgs& args, int64_t n, int64_t y0, int rows, int64_t x0, int columns,
                            int c0, int channels, bf16* to, int64_t to_pixel, int64_t to_row);

inline int total_channels(const ConvArgs& args) {
  return args.source[0].channels + (args.sources > 1 ? args.source[1].channels : 0);
}

// Elements of `values` values of a product's depth. Pairs take four bytes as float32 values do: what is
// counted in elements is the same for both.
inline int64_t elements(const ConvArgs& args, int64_t values) {
  return args.packed_dtype == Packed::kPairs ? ceil_div(values, 2) : values;
}

// Floats of memory for `n` elements of packed weights.
inline int64_t packed_size(const ConvArgs& args, int64_t n) {
  return args.packed_dtype == Packed::kBFloat16 ? ceil_div(n, 2) : n;
}

// Calls f.template operator()<T>() for the element type T of packed weights.
template <class F>
void with_packed(const ConvArgs& args, F&& f) {
  switch (args.packed_dtype) {
    case Packed::kFloat32:
      return f.template operator()<float>();
    case Packed::kBFloat16:
      return f.template operator()<bf16>();
    case Packed::kPairs:
      return f.template operator()<Pair>();
  }
}

}  // namespace p2pfast::P2PFAST_LEVEL
