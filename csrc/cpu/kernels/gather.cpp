#include "cpu/gather.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

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

// `columns` pixels in a row, of channels that are innermost.
template <class T, class To, bool kNorm, Act kAct>
P2PFAST_INLINE void gather_run(const T* from, int64_t from_pixel, const float* scale, const float* shift,
                               float slope, int columns, int channels, int readable, To* to,
                               int64_t to_pixel) {
  constexpr int kVectors = 4;  // whose scales and shifts stay in registers
  if (channels % (kVectors * kLanes) != 0) {
    for (int x = 0; x < columns; ++x)
      gather_pixel<T, To, kNorm, kAct>(from + x * from_pixel, scale, shift, slope, channels, readable,
                                       to + x * to_pixel);
    return;
  }
  const Vec slopes = splat(slope);
  for (int c = 0; c < channels; c += kVectors * kLanes) {
    Vec scales[kVectors], shifts[kVectors];
#pragma GCC unroll 4
    for (int v = 0; kNorm && v < kVectors; ++v) {
      scales[v] = load(scale + c + v * kLanes);
      shifts[v] = load(shift + c + v * kLanes);
    }
    for (int x = 0; x < columns; ++x) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vec value = load(from + x * from_pixel + c + v * kLanes);
        if constexpr (kNorm) value = value * scales[v] + shifts[v];
        store(to + x * to_pixel + c + v * kLanes, activate<kAct>(value, slopes));
      }
    }
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
  const int begin = static_cast<int>(min2<int64_t>(columns, max2<int64_t>(0, -x0)));  // inside
  const int end = static_cast<int>(max2<int64_t>(begin, min2<int64_t>(columns, width - x0)));
  for (int r = 0; r < rows; ++r) {
    To* row = to + r * to_row;
    const int64_t y = padded_index(y0 + r, height, pad);
    const T* line = image + y * s.row_stride;
    // Columns [x, x + count), which read those from ix on.
    auto run = [&](int x, int64_t ix, int count) {
      To* pixel = row + x * to_pixel;
      const T* from = line + ix * s.pixel_stride;
      if (s.channel_stride == 1) {
        gather_run<T, To, kNorm, kAct>(from, s.pixel_stride, scale, shift, s.slope, count, channels, readable,
                                       pixel, to_pixel);
        return;
      }
      for (int i = 0; i < count; ++i, from += s.pixel_stride, pixel += to_pixel) {
        for (int c = 0; c < channels; ++c) {
          float v = to_float(from[c * s.channel_stride]);
          if constexpr (kNorm) v = v * scale[c] + shift[c];
          put(pixel + c, activate<kAct>(v, s.slope));
        }
      }
    };
    for (int x = 0; x < columns;) {
      const int count = y >= 0 && x == begin && begin < end ? end - begin : 1;
      const int64_t ix = y < 0 ? -1 : padded_index(x0 + x, width, pad);
      if (ix >= 0) {
        run(x, ix, count);
      } else {
        for (int c = 0; c < channels; ++c) row[x * to_pixel + c] = To{};
      }
      x += count;
    }
  }
}

}  // namespace

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

template void gather(const ConvArgs& args, int64_t n, int64_t y0, int rows, int64_t x0, int columns, int c0,
                     int channels, float* to, int64_t to_pixel, int64_t to_row);
template void gather(const ConvArgs& args, int64_t n, int64_t y0, int rows, int64_t x0, int columns, int c0,
                     int channels, bf16* to, int64_t to_pixel, int64_t to_row);

}  // namespace p2pfast::P2PFAST_LEVEL
