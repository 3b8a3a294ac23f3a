// Few output channels (an image, a score map), stride 1: vectors are pixels of a row, and minimal
// filtering along columns saves multiplications. kStep input rows of a kTaps-row kernel become
// kPoints = kStep + kTaps - 1 rows of points, the horizontal taps are summed point by point, and the
// sums become kPoints output rows to which these input rows contribute. That is Toom-Cook's product of
// polynomials, the transpose of the filtering of toom.h: the larger matrix acts on the few output
// channels, and every input row is read and transformed once. Mathematics: p2pfast/ops/conv/README.md.
#pragma once

#include "cpu/ahead.h"
#include "cpu/conv.h"
#include "cpu/epilogue.h"
#include "cpu/parallel.h"
#include "cpu/planar.h"
#include "cpu/toom.h"
#include "cpu/workspace.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kMaxRowChannels = 4;  // output channels

// The points with the smallest error of float32 sums, found by search.
struct Rows3 {
  static constexpr int kTaps = 3, kStep = 4;
  static constexpr Toom<4, 3> m{{0.0, 0.65, -0.65, 1.5, -1.5}};
};
struct Rows4 {
  static constexpr int kTaps = 4, kStep = 4;
  static constexpr Toom<4, 4> m{{0.0, 0.55, -0.55, 1.1, -1.1, 2.5}};
};
struct Rows5 {
  static constexpr int kTaps = 5, kStep = 4;
  static constexpr Toom<4, 5> m{{0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0}};
};
struct Rows7 {
  static constexpr int kTaps = 7, kStep = 4;
  static constexpr Toom<4, 7> m{{0.0, 0.4, -0.4, 0.8, -0.8, 1.3, -1.3, 2.5, -2.5}};
};

// Sums of one point: m[co * m_co + x] (+)= sum over channels c and taps t of
// w[(c * taps + t) * kCo + co] * v[c * v_channel + x + t], for x < kVectors * kLanes.
template <int kCo, int kVectors>
__attribute__((noinline)) void rows_micro(const float* v, int64_t v_channel, const float* w, int channels,
                                          int taps, float* m, int64_t m_co, bool accumulate) {
  constexpr bool kHeld = kLanes == 16 && kCo > 1;  // 8 lanes have no register for it
  Vec acc[kCo][kVectors];
#pragma GCC unroll 16
  for (int o = 0; o < kCo; ++o) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) acc[o][n] = accumulate ? load(m + o * m_co + n * kLanes) : Vec{};
  }
  for (int c = 0; c < channels; ++c, v += v_channel) {
    for (int t = 0; t < taps; ++t, w += kCo) {
      Vec weight[kCo];
#pragma GCC unroll 16
      for (int o = 0; o < kCo; ++o) weight[o] = splat(w[o]);
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) {
        const Vec from = load(v + t + n * kLanes), x = kHeld ? held(from) : from;
#pragma GCC unroll 16
        for (int o = 0; o < kCo; ++o) acc[o][n] += weight[o] * x;
      }
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < kCo; ++o) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(m + o * m_co + n * kLanes, acc[o][n]);
  }
}

template <class S>
struct Rows {
  static constexpr int kTaps = S::kTaps, kStep = S::kStep, kPoints = kStep + kTaps - 1;
  static constexpr int kSlice = 32;                  // channels whose points lie in the L2 cache at a time
  static constexpr int kColumns = 128, kRows = 120;  // about what a task makes

  const ConvArgs& args;
  const int channels = total_channels(args);
  const int vectors = panel_vectors(args.out_channels);
  const int across = static_cast<int>(ceil_div(args.out_width, kColumns));
  const int columns = static_cast<int>(round_up(ceil_div(args.out_width, across), vectors* kLanes));
  const int64_t plane = round_up(columns + args.kernel_w - 1, kLanes) + kLanes;
  // From one point to the next: an odd number of cache lines, so that the points of a pixel spread over
  // the sets of the cache.
  const int64_t point = (ceil_div(kSlice * plane, 16) | 1) * 16;
  const int rows = band();
  const int down = static_cast<int>(ceil_div(args.out_height, rows));

  // Vectors of pixels whose sums fill the registers.
  static constexpr int panel_vectors(int out_channels) {
    constexpr int kWide[] = {16, 12, 8, 6}, kNarrow[] = {8, 6, 4, 3};
    return (kLanes == 16 ? kWide : kNarrow)[out_channels - 1];
  }
  // Output rows of a task; kTaps - 1 input rows are transformed by both neighbours. Fewer where there
  // would be few tasks.
  int band() const {
    const int64_t wanted = args.images * across * ceil_div(args.out_height, kRows) < 16 ? kRows / 4 : kRows;
    const int64_t each = ceil_div(args.out_height, ceil_div(args.out_height, wanted));
    return static_cast<int>(round_up(each + kTaps - 1, kStep) - kTaps + 1);
  }

  int64_t packed_floats() const {
    return static_cast<int64_t>(kPoints) * channels * args.kernel_w * args.out_channels;
  }

  // Layout: [slice][point][channel][horizontal tap][output channel].
  template <class W>
  void pack_from(float* packed) const {
    const W* weight = static_cast<const W*>(args.weight);
    for (int c0 = 0; c0 < channels; c0 += kSlice) {
      for (int p = 0; p < kPoints; ++p) {
        for (int i = c0; i < min2(channels, c0 + kSlice); ++i) {
          for (int t = 0; t < args.kernel_w; ++t) {
            for (int o = 0; o < args.out_channels; ++o) {
              const W* w = weight + o * args.weight_out_stride + i * args.weight_in_stride;
              double sum = 0;
              for (int k = 0; k < kTaps; ++k)
                if (S::m.g[p][k] != 0) sum += S::m.g[p][k] * to_float(w[tap_offset(args, kTaps - 1 - k, t)]);
              *packed++ = static_cast<float>(sum);
            }
          }
        }
      }
    }
  }

  struct Scratch {
    PlanarColumns window;
    float *planes, *points, *sums, *carry, *lines;
  };
  Scratch carve(Carver& carver) const {
    const int64_t sums = static_cast<int64_t>(args.out_channels) * columns;
    return {{reinterpret_cast<int32_t*>(carver.floats(plane)), 0, 0, 0},
            carver.floats(kStep * kLanes * plane),
            carver.floats(kPoints * point),
            carver.floats(kPoints * sums),
            carver.floats((kTaps - 1) * sums),
            carver.floats(kStep * sums)};
  }
  int64_t workspace(int threads) const {
    Carver carver{nullptr};
    carve(carver);
    return carver.used * threads;
  }

  // value[p] = the polynomial with coefficients row[] at point p. Points in pairs +-x share their even and
  // odd halves.
  P2PFAST_INLINE static void evaluate(const Vec (&row)[kStep], Vec (&value)[kPoints]) {
    unroll<kPoints - 1>([&](auto p) __attribute__((always_inline)) {
      constexpr float x = static_cast<float>(S::m.at[1][p]);
      constexpr bool pair = x > 0 && p + 2 < kPoints && static_cast<float>(S::m.at[1][p + 1]) == -x;
      if constexpr (x == 0.0f) {
        value[p] = row[0];
      } else if constexpr (pair) {
        const Vec even = row[0] + x * x * row[2], odd = row[1] + x * x * row[3];
        value[p] = even + x * odd;
        value[p + 1] = even - x * odd;
      } else if constexpr (x > 0) {
        value[p] = row[0] + x * (row[1] + x * (row[2] + x * row[3]));
      }
    });
    value[kPoints - 1] = row[kStep - 1];
  }
  static_assert(kStep == 4);
  struct Interpolate {
    static constexpr double at(int row, int point) { return S::m.bt[point][row]; }
  };

  // points[point][channel][x] of channels [c0, c0 + n) and input rows [y, y + kStep).
  void transform(const Scratch& scratch, int64_t image, int64_t y, int c0, int n) const {
    for (int c = 0; c < n; c += kLanes) {
      for (int r = 0; r < kStep; ++r)
        gather_planes(args, image, y + r, scratch.window, c0 + c, scratch.planes + r * kLanes * plane, plane);
      const int count = min2(kLanes, n - c), wide = scratch.window.columns;
      const int64_t from_row = kLanes * plane, to_point = point;
      for (int i = 0; i < count; ++i) {
        const float* from = scratch.planes + i * plane;
        float* to = scratch.points + (c + i) * plane;
        for (int x = 0; x < wide; x += kLanes) {
          Vec row[kStep], value[kPoints];
#pragma GCC unroll 8
          for (int r = 0; r < kStep; ++r) row[r] = load(from + r * from_row + x);
          evaluate(row, value);
#pragma GCC unroll 16
          for (int p = 0; p < kPoints; ++p) store(to + p * to_point + x, value[p]);
        }
      }
    }
  }

  static constexpr int64_t kAheadLines = 3072;  // more would push the points out

  // The input of rows [y, y + kStep) of the padded input and the columns of the window that begins at x0.
  Ahead ahead(int64_t image, int64_t y, int64_t x0, int valid, int products) const {
    Ahead a;
    for (int r = 0; r < kStep; ++r) a.add(args, image, y + r, x0 - args.pad_left, valid + args.kernel_w);
    a.share_among(products, kAheadLines);
    return a;
  }

  template <int kCo>
  void multiply_channels(const Scratch& scratch, const float* packed, int n, int valid, bool accumulate,
                         Ahead& next) const {
    constexpr int kVectors = panel_vectors(kCo);
    const int64_t sums = static_cast<int64_t>(kCo) * columns;
    for (int p = 0; p < kPoints; ++p) {
      for (int x = 0; x < valid; x += kVectors * kLanes) {
        next.fetch();
        rows_micro<kCo, kVectors>(scratch.points + p * point + x, plane,
                                  packed + static_cast<int64_t>(p) * n * args.kernel_w * kCo, n,
                                  args.kernel_w, scratch.sums + p * sums + x, columns, accumulate);
      }
    }
  }
  void multiply(const Scratch& scratch, const float* packed, int n, int valid, bool accumulate,
                Ahead& next) const {
    switch (args.out_channels) {
      case 1:
        return multiply_channels<1>(scratch, packed, n, valid, accumulate, next);
      case 2:
        return multiply_channels<2>(scratch, packed, n, valid, accumulate, next);
      case 3:
        return multiply_channels<3>(scratch, packed, n, valid, accumulate, next);
      default:
        return multiply_channels<4>(scratch, packed, n, valid, accumulate, next);
    }
  }

  // Adds the sums to what earlier rows left; kStep output rows are then complete.
  void interpolate(const Scratch& scratch) const {
    const int64_t sums = static_cast<int64_t>(args.out_channels) * columns;
    for (int64_t x = 0; x < sums; x += kLanes) {
      Vec sum[kPoints], row[kPoints];
#pragma GCC unroll 16
      for (int p = 0; p < kPoints; ++p) sum[p] = load(scratch.sums + p * sums + x);
      apply_matrix<Interpolate, kPoints, kPoints>(sum, 1, row, 1);
#pragma GCC unroll 16
      for (int i = 0; i < kPoints; ++i) {
        Vec v = row[i];
        if (i < kTaps - 1) v += load(scratch.carry + i * sums + x);
        store((i < kStep ? scratch.lines + i * sums : scratch.carry + (i - kStep) * sums) + x, v);
      }
    }
  }

  template <class T>
  void store_row(float* line, int64_t image, int oy, int ox, int valid) const {
    for (int o = 0; o < args.out_channels; ++o, line += columns) {
      const Vec bias = splat(args.bias ? args.bias[o] : 0.0f);
      for (int x = 0; x < valid; x += kLanes)
        store(line + x, finish(load(line + x) + bias, args.act, args.slope));
      T* to = static_cast<T*>(args.out.data) + image * args.out.image_stride + oy * args.out.row_stride +
              ox * args.out.pixel_stride + o * args.out.channel_stride;
      int x = 0;
      if (args.out.pixel_stride == 1)
        for (; x + kLanes <= valid; x += kLanes) store(to + x, load(line + x));
      for (; x < valid; ++x) put(to + x * args.out.pixel_stride, line[x]);
    }
  }

  void run() const {
    const int64_t per_image = static_cast<int64_t>(across) * down, share = workspace(1);
    const int64_t sums = static_cast<int64_t>(args.out_channels) * columns;
    parallel_for(args.images * per_image, [&](int64_t task, int worker) {
      Carver carver{static_cast<char*>(args.workspace) + worker * share};
      Scratch scratch = carve(carver);
      const int64_t image = task / per_image, at = task % per_image;
      const int y0 = static_cast<int>(at / across) * rows, x0 = static_cast<int>(at % across) * columns;
      const int y1 = min2(args.out_height, y0 + rows), valid = min2(columns, args.out_width - x0);
      if (valid <= 0) return;
      const int padded = static_cast<int>(round_up(valid, vectors * kLanes));
      scratch.window.set(args, static_cast<int64_t>(x0) - args.pad_left, padded + args.kernel_w - 1);
      std::memset(scratch.carry, 0, sizeof(float) * static_cast<size_t>((kTaps - 1) * sums));
      // Rows [g, g + kStep) of the padded input complete output rows [g - kTaps + 1, ...).
      for (int g = y0; g < y1 + kTaps - 1; g += kStep) {
        const float* packed = args.packed;
        const int64_t y = static_cast<int64_t>(g) - args.pad_top;
        const int products =
            static_cast<int>(kPoints * ceil_div(channels, kSlice) * (padded / (vectors * kLanes)));
        Ahead next = ahead(image, y + kStep, x0, valid, products);
        for (int c0 = 0; c0 < channels; c0 += kSlice) {
          const int n = min2(kSlice, channels - c0);
          transform(scratch, image, y, c0, n);
          multiply(scratch, packed, n, valid, c0 > 0, next);
          packed += static_cast<int64_t>(kPoints) * n * args.kernel_w * args.out_channels;
        }
        interpolate(scratch);
        for (int i = 0; i < kStep; ++i) {
          const int oy = g - kTaps + 1 + i;
          if (oy < y0 || oy >= y1) continue;
          auto store = args.out.dtype == DType::kFloat32 ? &Rows::store_row<float> : &Rows::store_row<bf16>;
          (this->*store)(scratch.lines + i * sums, image, oy, x0, valid);
        }
      }
    });
  }

  double multiplications() const {
    return static_cast<double>(args.images) * args.out_width * ceil_div(args.out_height, kStep) * kPoints *
           args.kernel_w * channels * args.out_channels;
  }
};

// Calls f.template operator()<Scheme>() for the scheme of this shape and returns true, if there is one.
template <class F>
bool with_rows(const ConvArgs& args, F&& f) {
  if (args.transposed || args.stride != 1 || args.out_channels > kMaxRowChannels) return false;
  switch (args.kernel_h) {
    case 3:
      return f.template operator()<Rows3>(), true;
    case 4:
      return f.template operator()<Rows4>(), true;
    case 5:
      return f.template operator()<Rows5>(), true;
    case 7:
      return f.template operator()<Rows7>(), true;
    default:
      return false;
  }
}

}  // namespace p2pfast::P2PFAST_LEVEL
