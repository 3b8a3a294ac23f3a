// The prologue of kernels whose vectors are pixels: like gather.h, but into planes, one for each channel.
#pragma once

#include "cpu/gather.h"
#include "cpu/transpose.h"

namespace p2pfast::P2PFAST_LEVEL {

// Channels [c, c + count), count at most kLanes, of one source's row y, pixels column[0 .. columns):
// to[i * plane + x]. columns is a multiple of kLanes.
template <class T, bool kNorm, Act kAct>
void planar_row(const Source& s, int64_t image, int64_t y, const int32_t* column, int columns, int c,
                int count, float* to, int64_t plane) {
  const T* row =
      static_cast<const T*>(s.data) + image * s.image_stride + y * s.row_stride + c * s.channel_stride;
  const float* scale = kNorm ? s.scale + image * s.norm_stride + c : nullptr;
  const float* shift = kNorm ? s.shift + image * s.norm_stride + c : nullptr;
  if (s.channel_stride == 1 && c + kLanes <= s.pixel_stride) {
    const Vec slope = splat(s.slope);
    Vec scales = {}, shifts = {};
    if constexpr (kNorm) scales = load(scale), shifts = load(shift);
    for (int x = 0; x < columns; x += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        v[l] = load(row + column[x + l] * s.pixel_stride);
        if constexpr (kNorm) v[l] = v[l] * scales + shifts;
        v[l] = activate<kAct>(v[l], slope);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l)
        if (l < count) store(to + l * plane + x, v[l]);
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    for (int x = 0; x < columns; ++x) {
      float v = to_float(row[i * s.channel_stride + column[x] * s.pixel_stride]);
      if constexpr (kNorm) v = v * scale[i] + shift[i];
      to[i * plane + x] = activate<kAct>(v, s.slope);
    }
  }
}

// The columns of a window of the padded input: which input columns they read, and how many at either end
// are zeros.
struct PlanarColumns {
  int32_t* column;
  int columns;  // a multiple of kLanes; those past `valid` repeat the last
  int zeros_before, zeros_after;

  void set(const ConvArgs& args, int64_t x0, int valid) {
    columns = static_cast<int>(round_up(valid, kLanes));
    zeros_before = zeros_after = 0;
    for (int x = 0; x < columns; ++x) {
      int64_t i = x < valid ? padded_index(x0 + x, args.width, args.pad) : column[x - 1];
      if (i < 0) {
        i = 0;
        (x0 + x < 0 ? zeros_before : zeros_after) += 1;
      } else if (zeros_after > 0) {
        ++zeros_after;  // past `valid`
      }
      column[x] = static_cast<int32_t>(i);
    }
  }
};

// Channels [c0, c0 + kLanes) of the concatenated sources, as far as they exist; row y of the padded input.
inline void gather_planes(const ConvArgs& args, int64_t image, int64_t y, const PlanarColumns& columns,
                          int c0, float* to, int64_t plane) {
  y = padded_index(y, args.height, args.pad);
  int first = 0;
  for (int i = 0; i < args.sources; ++i) {
    const Source& s = args.source[i];
    const int begin = max2(c0, first), end = min2(c0 + kLanes, first + s.channels);
    if (begin < end) {
      float* base = to + (begin - c0) * plane;
      const int count = end - begin;
      if (y < 0) {
        for (int c = 0; c < count; ++c)
          std::memset(base + c * plane, 0, sizeof(float) * static_cast<size_t>(columns.columns));
      } else {
        auto call = [&]<class T, bool kNorm>() {
          auto run = s.act == Act::kRelu    ? planar_row<T, kNorm, Act::kRelu>
                     : s.act == Act::kLeaky ? planar_row<T, kNorm, Act::kLeaky>
                                            : planar_row<T, kNorm, Act::kNone>;
          run(s, image, y, columns.column, columns.columns, begin - first, count, base, plane);
        };
        if (s.dtype == DType::kFloat32) {
          s.scale ? call.template operator()<float, true>() : call.template operator()<float, false>();
        } else {
          s.scale ? call.template operator()<bf16, true>() : call.template operator()<bf16, false>();
        }
        for (int c = 0; c < count; ++c) {
          float* row = base + c * plane;
          for (int x = 0; x < columns.zeros_before; ++x) row[x] = 0.0f;
          for (int x = 0; x < columns.zeros_after; ++x) row[columns.columns - 1 - x] = 0.0f;
        }
      }
    }
    first += s.channels;
  }
}

}  // namespace p2pfast::P2PFAST_LEVEL
