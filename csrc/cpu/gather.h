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

// `channels` consecutive channels of one pixel; writes up to kLanes - 1 values past them, which the
// next pixel (or the scratch's slack) takes.
template <class T, class To, bool kNorm, Act kAct>
P2PFAST_INLINE void gather_pixel(const T* from, const float* scale, const float* shift, float slope,
                                 int channels, int readable, To* to) {
  const Vec slopes = splat(slope);
  int c = 0;
  for (; c + kLanes <= readable && c < channels; c += kLanes) {
    Vec v = load(from + c);
    if constexpr (kNorm) v = v * load(scale + c) + load(shift + c);
    store(to + c, activate<kAct>(v, slopes));
  }
  for (; c < channels; ++c) {
    float v = to_float(from[c]);
    if constexpr (kNorm) v = v * scale[c] + shift[c];
    put(to + c, activate<kAct>(v, slope));
  }
}

template <class T, class To, bool kNorm, Act kAct>
void gather_source(const Source& s, Pad pad, int64_t height, int64_t width, int64_t n, int64_t y0, int rows,
                   int64_t x0, int columns, int c0, int channels, bool alone, To* to, int64_t to_pixel,
                   int64_t to_row) {
  const T* image = static_cast<const T*>(s.data) + n * s.image_stride + c0 * s.channel_stride;
  const float* scale = kNorm ? s.scale + n * s.norm_stride + c0 : nullptr;
  const float* shift = kNorm ? s.shift + n * s.norm_stride + c0 : nullptr;
  // Lanes past the last channel may be read where the pixel has padding lanes for them, and written
  // where no other source's channels follow.
  const int readable = alone ? static_cast<int>(min2<int64_t>(s.pixel_stride - c0, 1 << 30)) : channels;
  for (int r = 0; r < rows; ++r) {
    To* row = to + r * to_row;
    const int64_t y = padded_index(y0 + r, height, pad);
    for (int x = 0; x < columns; ++x) {
      const int64_t ix = y < 0 ? -1 : padded_index(x0 + x, width, pad);
      To* pixel = row + x * to_pixel;
      if (ix < 0) {
        for (int c = 0; c < channels; ++c) pixel[c] = To{};
        continue;
      }
      const T* from = image + y * s.row_stride + ix * s.pixel_stride;
      if (s.channel_stride == 1) {
        gather_pixel<T, To, kNorm, kAct>(from, scale, shift, s.slope, channels, readable, pixel);
      } else {
        for (int c = 0; c < channels; ++c) {
          float v = to_float(from[c * s.channel_stride]);
          if constexpr (kNorm) v = v * scale[c] + shift[c];
          put(pixel + c, activate<kAct>(v, s.slope));
        }
      }
    }
  }
}

// Values that a gather may write past the last pixel.
inline constexpr int kGatherSlack = 16;

// Channels [c0, c0 + channels) of the concatenated sources, rows [y0, y0 + rows) and columns
// [x0, x0 + columns) of the padded input of image n.
template <class To>
void gather(const ConvArgs& args, int64_t n, int64_t y0, int rows, int64_t x0, int columns, int c0,
            int channels, To* to, int64_t to_pixel, int64_t to_row) {
  int first = 0;
  for (int i = 0; i < args.sources; ++i) {
    const Source& s = args.source[i];
    const int begin = max2(c0, first), end = min2(c0 + channels, first + s.channels);
    if (begin < end) {
      const int from = begin - first, count = end - begin;
      To* base = to + (begin - c0);
      auto call = [&]<class T, bool kNorm>() {
        auto run = s.act == Act::kRelu    ? gather_source<T, To, kNorm, Act::kRelu>
                   : s.act == Act::kLeaky ? gather_source<T, To, kNorm, Act::kLeaky>
                                          : gather_source<T, To, kNorm, Act::kNone>;
        run(s, args.pad, args.height, args.width, n, y0, rows, x0, columns, from, count, args.sources == 1,
            base, to_pixel, to_row);
      };
      if (s.dtype == DType::kFloat32) {
        s.scale ? call.template operator()<float, true>() : call.template operator()<float, false>();
      } else {
        s.scale ? call.template operator()<bf16, true>() : call.template operator()<bf16, false>();
      }
    }
    first += s.channels;
  }
}

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
