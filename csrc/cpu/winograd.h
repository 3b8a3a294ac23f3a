// Convolution by minimal filtering in two dimensions, for any scheme of toom.h in both dimensions:
// input windows become kPoints x kPoints matrices of channels, one matrix product a point, and the
// sums become output tiles. Two drivers: blocks of tiles with weights transformed beforehand, and
// all tiles at once with weights transformed on the fly.
#pragma once

#include <type_traits>

#include "cpu/ahead.h"
#include "cpu/conv.h"
#include "cpu/epilogue.h"
#include "cpu/gather.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/toom.h"
#include "cpu/transpose.h"
#include "cpu/workspace.h"

namespace p2pfast::P2PFAST_LEVEL {

// A stride in floats of at least n: an odd number of cache lines, so that what is read or written one
// stride apart spreads over all sets of the cache.
inline int64_t spread(int64_t n) { return ceil_div(n, 16) % 2 == 0 ? round_up(n, 16) + 16 : round_up(n, 16); }

template <class S>
struct Winograd {
  static constexpr int kPoints2 = S::kPoints * S::kPoints;
  static constexpr int kSums2 = S::kSums * S::kSums;
  static constexpr int kTaps2 = S::kTaps * S::kTaps;
  static constexpr int kChunk = 64;                                  // channels of one gather
  static constexpr int kPiece = max2(2, min2(16, 96 / S::kStepIn));  // tiles of one gather
  static constexpr int kPieceColumns = S::kStepIn * (kPiece - 1) + S::kWindow;
  static constexpr int kGatherFloats = S::kWindow * kPieceColumns * kChunk + kGatherSlack;

  const ConvArgs& args;
  const int channels = total_channels(args);
  const int depth = static_cast<int>(elements(args, channels));  // of the products
  const int tiles_y = static_cast<int>(ceil_div(args.out_height, S::kStepOut));
  const int tiles_x = static_cast<int>(ceil_div(args.out_width, S::kStepOut));
  const int64_t tiles = static_cast<int64_t>(tiles_y) * tiles_x;
  const int64_t block_lda = spread(depth);
  const int out_channels = static_cast<int>(round_up(args.out_channels, kLanes));
  // Where not all tiles of an image are computed: those that are. Tile t of the functions below is then
  // list[t]; see winograd_skip.h.
  const int32_t* list = nullptr;
  int64_t listed(int64_t t) const { return list ? list[t] : t; }

  // Panels of weights: all full but the last.
  static int panel_vectors(int columns_left) { return min2(kPanelVectors, columns_left / kLanes); }

  // --- weights ---------------------------------------------------------------------------------

  // Copies input channels [k0, k0 + count) of output channels [c, c + vectors * kLanes) to
  // to[channel][tap][column]: a transposition, in squares of kLanes, of what lies together in memory. That is
  // all of an output channel, or the taps of one pair of channels where the weight's axes are exchanged.
  template <class W, class T>
  void sort_weights(int k0, int count, int c, int vectors, T* to) const {
    const int width = vectors * kLanes;
    const bool exchanged = args.weight_in_stride != kTaps2;
    const int runs = exchanged ? count : 1, run = exchanged ? kTaps2 : count * kTaps2;
    const int64_t ahead = 4 * args.weight_in_stride;
    const W* const first = static_cast<const W*>(args.weight) + k0 * args.weight_in_stride;
    const W* const end = static_cast<const W*>(args.weight) +
                         (args.out_channels - 1) * args.weight_out_stride +
                         (channels - 1) * args.weight_in_stride + kTaps2;
    for (int k = 0; k < runs; ++k) {
      for (int column = 0; column < width; column += kLanes) {
        const int columns = min2(kLanes, args.out_channels - c - column);
        const W* const from = first + k * args.weight_in_stride + (c + column) * args.weight_out_stride;
        T* const at = to + static_cast<int64_t>(k) * kTaps2 * width + column;
        for (int i = 0; i < run; i += kLanes) {
          Vec v[kLanes];
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) {
            const W* const w = from + l * args.weight_out_stride + i;
            // Runs are too short for the processor to see where the next ones are.
            if (exchanged) __builtin_prefetch(w + ahead);
            v[l] = l >= columns ? Vec{} : w + kLanes <= end ? load(w) : load_some(w, end - w);
          }
          transpose(v);
          const int values = min2(kLanes, run - i);
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l)
            if (l < values) store(at + static_cast<int64_t>(place(i + l)) * width, v[l]);
        }
      }
    }
  }
  // Where tap t of a run of channels goes.
  int place(int t) const { return args.weight_turned ? t / kTaps2 * kTaps2 + kTaps2 - 1 - t % kTaps2 : t; }
  template <class T>
  void sort_any_weights(int k0, int count, int c, int vectors, T* to) const {
    if (args.weight_dtype == DType::kFloat32) {
      sort_weights<float>(k0, count, c, vectors, to);
    } else {
      sort_weights<bf16>(k0, count, c, vectors, to);
    }
  }

  // Row kRow of the points of `count` sorted input channels, into u + (point of the row) * point_stride.
  template <int kRow, class T, class U>
  __attribute__((noinline)) static void transform_row(const T* from, int count, int vectors, U* u,
                                                      int64_t point_stride) {
    const int width = vectors * kLanes;
    for (int k = 0; k < count; ++k, from += kTaps2 * width) {
#pragma GCC unroll 4
      for (int vector = 0; vector < kPanelVectors; ++vector) {
        if (vector == vectors) break;
        const int v = vector * kLanes;
        Vec taps[kTaps2], half[S::kTaps], row[S::kPoints];
#pragma GCC unroll 16
        for (int t = 0; t < kTaps2; ++t)
          if (S::weight(kRow, t / S::kTaps) != 0.0) taps[t] = load(from + t * width + v);
#pragma GCC unroll 4
        for (int x = 0; x < S::kTaps; ++x)
          apply_matrix<WeightRow<kRow>, 1, S::kTaps>(taps + x, S::kTaps, half + x, 1);
        apply_matrix<Weights, S::kPoints, S::kTaps>(half, 1, row, 1);
#pragma GCC unroll 10
        for (int j = 0; j < S::kPoints; ++j) set_values(u + j * point_stride, width, k, v, row[j]);
      }
    }
  }
  struct Weights {
    static constexpr double at(int point, int tap) { return S::weight(point, tap); }
  };
  template <int kRow>
  struct WeightRow {
    static constexpr double at(int, int tap) { return S::weight(kRow, tap); }
  };
  template <class T, class U>
  static void transform_any_row(int row, const T* from, int count, int vectors, U* u, int64_t point_stride) {
    unroll<S::kPoints>([&](auto i) {
      if (row == i) transform_row<i>(from, count, vectors, u, point_stride);
    });
  }

  int64_t packed_floats() const {
    return packed_size(args, static_cast<int64_t>(kPoints2) * depth * out_channels);
  }

  // Layout: [point][panel][channel, or pair of channels][column of the panel].
  template <class U>
  void pack(U* packed) const {
    const int64_t panels = ceil_div(out_channels, kPanel), parts = ceil_div(channels, kPart);
    const int64_t point = static_cast<int64_t>(depth) * out_channels;
    parallel_for(panels * parts, [&](int64_t task, int) {
      const int c = static_cast<int>(task / parts) * kPanel, k0 = static_cast<int>(task % parts) * kPart;
      const int vectors = panel_vectors(out_channels - c), count = min2(kPart, channels - k0);
      alignas(64) float sorted[kPart * kTaps2 * kPanel];
      sort_any_weights(k0, count, c, vectors, sorted);
      U* to = packed + static_cast<int64_t>(c) * depth + elements(args, k0) * vectors * kLanes;
      for (int i = 0; i < S::kPoints; ++i, to += S::kPoints * point) {
        if constexpr (std::is_same_v<U, bf16>) {  // rounded afterwards: functions for float are there anyway
          alignas(64) float row[S::kPoints * kPart * kPanel];
          transform_any_row(i, sorted, count, vectors, row, kPart * kPanel);
          for (int j = 0; j < S::kPoints; ++j)
            for (int k = 0; k < count * vectors * kLanes; k += kLanes)
              store(to + j * point + k, load(row + j * kPart * kPanel + k));
        } else {
          transform_any_row(i, sorted, count, vectors, to, point);
        }
      }
    });
  }
  static constexpr int kPart = 16;  // channels, of what a thread sorts at a time

  // Of driver 2: weights sorted only, [panel][channel][tap][column of the panel].
  int64_t sorted_values() const { return static_cast<int64_t>(out_channels) * channels * kTaps2; }
  template <class T>
  void sort(T* to) const {
    const int64_t panels = ceil_div(out_channels, kPanel), parts = ceil_div(channels, kPart);
    parallel_for(panels * parts, [&](int64_t task, int) {
      const int c = static_cast<int>(task / parts) * kPanel, k0 = static_cast<int>(task % parts) * kPart;
      sort_panel(c, k0, min2(kPart, channels - k0), to + static_cast<int64_t>(c) * channels * kTaps2);
    });
  }
  // Channels [k0, k0 + count) of the panel at output channel c, which begins at `panel`.
  template <class T>
  void sort_panel(int c, int k0, int count, T* panel) const {
    const int vectors = panel_vectors(out_channels - c);
    sort_any_weights(k0, count, c, vectors, panel + static_cast<int64_t>(k0) * kTaps2 * vectors * kLanes);
  }

  // --- input -----------------------------------------------------------------------------------

  // `count` tiles of one row of tiles, channels [c0, c0 + n), into v + point * point_stride + tile * lda. The
  // strides and v are in elements.
  void transform_any_input(int64_t image, int tile_y, int tile_x, int count, int c0, int n, float* window,
                           float* v, int64_t lda, int64_t point_stride) const {
    if (args.packed_dtype == Packed::kPairs) {
      transform_input(image, tile_y, tile_x, count, c0, n, window, reinterpret_cast<bf16*>(v), 2 * lda,
                      2 * point_stride);
    } else {
      transform_input(image, tile_y, tile_x, count, c0, n, window, v, lda, point_stride);
    }
  }

  // The same with strides in values.
  template <class V>
  __attribute__((noinline)) void transform_input(int64_t image, int tile_y, int tile_x, int count, int c0,
                                                 int n, float* window, V* v, int64_t lda,
                                                 int64_t point_stride) const {
    const int columns = S::kStepIn * (count - 1) + S::kWindow;
    const int64_t to_row = static_cast<int64_t>(columns) * n;
    gather(args, image, S::kStepIn * tile_y + S::origin(args.pad_top), S::kWindow,
           S::kStepIn * tile_x + S::origin(args.pad_left), columns, c0, n, window, n, to_row);
    for (int t = 0; t < count; ++t) {
      const float* from = window + static_cast<int64_t>(t) * S::kStepIn * n;
      V* to = v + t * lda;
      for (int c = 0; c < n; c += kLanes) {
        Vec half[S::kPoints * S::kWindow];
#pragma GCC unroll 10
        for (int x = 0; x < S::kWindow; ++x) {
          Vec column[S::kWindow];
#pragma GCC unroll 10
          for (int y = 0; y < S::kWindow; ++y) column[y] = load(from + y * to_row + x * n + c);
          S::input(column, 1, half + x, S::kWindow);
        }
#pragma GCC unroll 10
        for (int i = 0; i < S::kPoints; ++i) {
          Vec row[S::kPoints];
          S::input(half + i * S::kWindow, 1, row, 1);
#pragma GCC unroll 10
          for (int j = 0; j < S::kPoints; ++j) store(to + (i * S::kPoints + j) * point_stride + c, row[j]);
        }
      }
      if (sizeof(V) == 2 && n % 2 != 0)  // what the last pair lacks
        for (int p = 0; p < kPoints2; ++p) to[p * point_stride + n] = V{};
    }
  }

  // --- products --------------------------------------------------------------------------------

  // sums[s][row][column] over `rows` tiles, panel by panel of `width` columns; see panel_of. The points of
  // elements [k0, k0 + kDepth) begin at v + k0 / kDepth * v_chunk. A chunk of the points stays in the cache
  // while all panels use it; the weights pass by once. Rows of a product fetch from `ahead`.
  template <class U>
  void multiply(const float* v, int64_t v_chunk, int64_t lda, int64_t v_point, int rows, const U* u,
                int64_t u_point, int width, float* sums, int64_t sum_stride, Ahead& ahead) const {
#pragma GCC unroll 1
    for (int i = 0; i < S::kPoints; ++i) {
#pragma GCC unroll 1
      for (int j = 0; j < S::kPoints; ++j) {
        const int si = S::sum_of(i), sj = S::sum_of(j);
        const bool fresh = si == i && sj == j;
        const int point = i * S::kPoints + j;
        const U* weights = u + point * u_point;
        for (int c = 0; c < width; c += kPanel) {
          const int vectors = panel_vectors(width - c);
          float* sum = panel_of(sums, c, sum_stride) + (si * S::kSums + sj) * sum_stride;
          for (int k0 = 0; k0 < depth; k0 += kDepth) {
            const int k = min2(kDepth, depth - k0);
            const U* now = weights;
            weights += static_cast<int64_t>(k) * vectors * kLanes;
            const bool last = k0 + k == depth && c + kPanel >= width;
            const U* next = !last ? weights : point + 1 < kPoints2 ? u + (point + 1) * u_point : now;
            const auto* from =
                reinterpret_cast<const Factor<U>*>(v) + k0 / kDepth * v_chunk + point * v_point;
            auto row = [&](int m) {
              if (m % kFetchRows == 0) ahead.fetch();
              return from + m * lda;
            };
            gemm_panel(vectors, rows, row, now, sum, kPanel, k, !fresh || k0 > 0, next);
          }
        }
      }
    }
  }

  // The same with sorted weights, transformed a row of points and `chunk` elements of the depth at a time
  // into u. A chunk's weights stay in the cache for all rows of points. taps(c, channel, count, ahead) is
  // where those of the panel at column c lie, `count` channels from `channel` on, and may say what it will
  // read next.
  template <class U, class Taps>
  void multiply_sorted(const float* v, int chunk, int64_t lda, int64_t v_point, int rows, Taps&& taps,
                       int width, U* u, float* sums, int64_t sum_stride) const {
    const int64_t u_point = spread(static_cast<int64_t>(chunk) * width);
    for (int k0 = 0; k0 < depth; k0 += chunk) {
      const int k = min2(chunk, depth - k0), channel = k0 * kValues<U>;
      const int count = min2(k * kValues<U>, channels - channel);
      Ahead ahead;
      decltype(taps(0, 0, 0, ahead)) from[kSortedPanels] = {};
      for (int c = 0; c < width; c += kPanel) from[c / kPanel] = taps(c, channel, count, ahead);
      ahead.share_among(kPoints2 * ceil_div(width, kPanel) * ceil_div(rows, kFetchRows), kAheadLines);
      for (int i = 0; i < S::kPoints; ++i) {
        for (int c = 0; c < width; c += kPanel)
          transform_any_row(i, from[c / kPanel], count, panel_vectors(width - c), u + c * chunk, u_point);
#pragma GCC unroll 1
        for (int j = 0; j < S::kPoints; ++j) {
          const int si = S::sum_of(i), sj = S::sum_of(j);
          const bool fresh = si == i && sj == j && k0 == 0;
          const auto* const point =
              reinterpret_cast<const Factor<U>*>(v) +
              (static_cast<int64_t>(k0 / chunk) * kPoints2 + i * S::kPoints + j) * v_point;
          for (int c = 0; c < width; c += kPanel) {
            auto row = [&](int m) {
              if (m % kFetchRows == 0) ahead.fetch();
              return point + m * lda;
            };
            // Weights are in the cache; the next point of the input may not be.
            gemm_panel(panel_vectors(width - c), rows, row, u + j * u_point + c * chunk,
                       panel_of(sums, c, sum_stride) + (si * S::kSums + sj) * sum_stride, kPanel, k, !fresh,
                       reinterpret_cast<const U*>(point + v_point));
          }
        }
      }
    }
  }

  // --- output ----------------------------------------------------------------------------------

  // The output of a tile, before bias: value(y, x, v) for each, row by row.
  template <class F>
  static void tile_rows(const float* sums, int64_t sum_stride, F&& value) {
    Vec half[S::kStepOut * S::kSums];
#pragma GCC unroll 10
    for (int j = 0; j < S::kSums; ++j) {
      Vec column[S::kSums];
#pragma GCC unroll 10
      for (int i = 0; i < S::kSums; ++i) column[i] = load(sums + (i * S::kSums + j) * sum_stride);
      S::output(column, 1, half + j, S::kSums);
    }
#pragma GCC unroll 8
    for (int y = 0; y < S::kStepOut; ++y) {
      Vec row[S::kStepOut];
      S::output(half + y * S::kSums, 1, row, 1);
#pragma GCC unroll 8
      for (int x = 0; x < S::kStepOut; ++x) value(y, x, row[x]);
    }
  }

  template <class T>
  T* tile_at(int64_t image, int ty, int tx) const {
    return static_cast<T*>(args.out.data) + image * args.out.image_stride +
           static_cast<int64_t>(ty) * S::kStepOut * args.out.row_stride +
           static_cast<int64_t>(tx) * S::kStepOut * args.out.pixel_stride;
  }

  // A vector of channels of a tile that may reach over the edge, or of an output that is not plain.
  template <class T>
  void store_tile(int64_t image, int ty, int tx, int c, const float* sums, int64_t sum_stride, Vec bias,
                  Moments& moments) const {
    const int rows = min2(S::kStepOut, args.out_height - ty * S::kStepOut);
    const int columns = min2(S::kStepOut, args.out_width - tx * S::kStepOut);
    T* base = tile_at<T>(image, ty, tx);
    Vec tile[S::kStepOut * S::kStepOut];
    tile_values(sums, sum_stride, tile);
#pragma GCC unroll 1
    for (int y = 0; y < rows; ++y) {
#pragma GCC unroll 1
      for (int x = 0; x < columns; ++x) {
        const Vec value = tile[y * S::kStepOut + x] + bias;
        if (args.partial) moments.add(value);
        put_vector(args, base + y * args.out.row_stride + x * args.out.pixel_stride, c,
                   finish_in_tile(value, args.act, args.slope));
      }
    }
    if (args.partial) moments.settle();
  }
  __attribute__((noinline)) static void tile_values(const float* sums, int64_t sum_stride, Vec* tile) {
    tile_rows(sums, sum_stride, [&](int y, int x, Vec v) { tile[y * S::kStepOut + x] = v; });
  }

  // A whole tile of kCount vectors of channels, which are innermost. `sums` are of the tile.
  static constexpr int kLine = min2(16 / kLanes, kPanelVectors);
  template <class T, int kCount, bool kStream>
  void store_line(int64_t image, int ty, int tx, int c0, int c, const float* sums, int64_t sum_stride,
                  const Vec* bias, Moments* moments) const {
    constexpr int kStep = S::kStepOut;
    Vec tile[kStep * kStep * kCount];
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      const Vec b = bias[v];
      Vec shift = moments[v].shift, sum{}, squares{};
      const bool first = moments[v].count == 0;
      tile_rows(panel_of(sums, c + v * kLanes, sum_stride), sum_stride, [&](int y, int x, Vec raw) {
        const Vec value = raw + b;
        if (first && y == 0 && x == 0) shift = value;
        const Vec d = value - shift;
        sum += d;
        squares += d * d;
        tile[(y * kStep + x) * kCount + v] = value;
      });
      moments[v].add_sums(shift, sum, squares, kStep * kStep);
    }
    T* base = tile_at<T>(image, ty, tx) + c0 + c;
    for (int y = 0; y < kStep; ++y) {
      T* to = base + y * args.out.row_stride;
#pragma GCC unroll 4
      for (int x = 0; x < kStep; ++x, to += args.out.pixel_stride) {
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          const Vec value = finish_in_tile(tile[(y * kStep + x) * kCount + v], args.act, args.slope);
          kStream ? stream(to + v * kLanes, value) : store(to + v * kLanes, value);
        }
      }
    }
  }

  // Stores tiles [first, first + count) of an image and their statistics as part `part`.
  template <class T>
  void store_tiles(int64_t image, int64_t first, int count, int c0, int width, const float* sums,
                   int64_t sum_stride, int64_t part, int64_t parts) const {
    constexpr int kMaxVectors = 16;
    const bool plain = args.out.channel_stride == 1 && c0 + width <= args.out.pixel_stride;
    const bool streaming = plain && streams(args);
    for (int g = 0; g < width; g += kMaxVectors * kLanes) {
      const int vectors = min2(kMaxVectors, (width - g) / kLanes);
      Moments moments[kMaxVectors];
      Vec bias[kMaxVectors];
      for (int v = 0; v < vectors; ++v) {
        bias[v] = Vec{};
        for (int l = 0; args.bias && l < kLanes && c0 + g + v * kLanes + l < args.out_channels; ++l)
          bias[v][l] = args.bias[c0 + g + v * kLanes + l];
      }
      for (int t = 0; t < count; ++t) {
        const int64_t tile = listed(first + t);
        const int ty = static_cast<int>(tile / tiles_x), tx = static_cast<int>(tile % tiles_x);
        const bool whole =
            plain && (ty + 1) * S::kStepOut <= args.out_height && (tx + 1) * S::kStepOut <= args.out_width;
        for (int v = 0; v < vectors;) {
          const int c = g + v * kLanes;
          const float* tile_sums = sums + t * kPanel;
          constexpr int kWhole = kLineVectors<T>;
          if (whole && streaming && v + kWhole <= vectors && (c0 + c) % (kWhole * kLanes) == 0) {
            store_line<T, kWhole, true>(image, ty, tx, c0, c, tile_sums, sum_stride, bias + v, moments + v);
            v += kWhole;
          } else if (whole && v + kLine <= vectors) {
            store_line<T, kLine, false>(image, ty, tx, c0, c, tile_sums, sum_stride, bias + v, moments + v);
            v += kLine;
          } else {
            store_tile<T>(image, ty, tx, c0 + c, panel_of(tile_sums, c, sum_stride), sum_stride, bias[v],
                          moments[v]);
            ++v;
          }
        }
      }
      if (streaming) finish_streams();
      if (!args.partial) continue;
      const int stride = stats_stride(args);
      float* partial = args.partial + (image * parts + part) * 2 * stride + c0 + g;
      for (int v = 0; v < vectors; ++v) moments[v].write(partial + v * kLanes, partial + stride + v * kLanes);
      if (c0 + g == 0) args.count[image * parts + part] = static_cast<float>(moments[0].count);
    }
  }

  void store_any_tiles(int64_t image, int64_t first, int count, int c0, int width, const float* sums,
                       int64_t sum_stride, int64_t part, int64_t parts) const {
    if (args.out.dtype == DType::kFloat32) {
      store_tiles<float>(image, first, count, c0, width, sums, sum_stride, part, parts);
    } else {
      store_tiles<bf16>(image, first, count, c0, width, sums, sum_stride, part, parts);
    }
  }

  // Splits tiles [first, first + count) of an image at the ends of rows and into pieces.
  template <class F>
  void for_pieces(int64_t first, int64_t count, F&& f) const {
    for (int64_t t = first; t < first + count;) {
      const int64_t tile = listed(t);
      const int ty = static_cast<int>(tile / tiles_x), tx = static_cast<int>(tile % tiles_x);
      const int most =
          static_cast<int>(min2<int64_t>(min2<int64_t>(kPiece, tiles_x - tx), first + count - t));
      int n = list ? 1 : most;
      while (n < most && list[t + n] == tile + n) ++n;
      f(ty, tx, n, t - first);
      t += n;
    }
  }

  // --- driver 1: blocks of tiles, packed weights -------------------------------------------------

  int block_tiles() const { return max2(kMaxRows, args.block); }
  int64_t blocks() const { return ceil_div(tiles, block_tiles()); }
  int block_group() const { return min2<int>(out_channels, max2<int>(kPanel, round_up(args.group, kPanel))); }

  int64_t v_point(int64_t rows) const { return spread(rows * block_lda); }
  static int64_t sum_stride(int64_t rows) { return spread(rows * kPanel); }
  int64_t sums_floats(int64_t rows) const {
    return ceil_div(block_group(), kPanel) * kSums2 * sum_stride(rows);
  }
  // Sums are kept panel by panel: rows of a panel are contiguous, and a panel's sums fit the L2 cache.
  template <class P>
  static P* panel_of(P* sums, int column, int64_t stride) {
    return sums + column / kPanel * kSums2 * stride + column % kPanel;
  }

  struct BlockScratch {
    float *window, *v, *sums;
  };
  BlockScratch carve_block(Carver& carver) const {
    return {carver.floats(kGatherFloats), carver.floats(kPoints2 * v_point(block_tiles()) + kLanes),
            carver.floats(sums_floats(block_tiles()))};
  }
  int64_t block_workspace(int threads) const {
    Carver carver{nullptr};
    carve_block(carver);
    return carver.used * threads;
  }

  void run_blocks() const {
    const int64_t per_image = blocks(), share = block_workspace(1);
    parallel_for(args.images * per_image, [&](int64_t task, int worker) {
      const int64_t image = task / per_image, block = task % per_image, first = block * block_tiles();
      const int count = static_cast<int>(min2<int64_t>(block_tiles(), tiles - first));
      run_block(static_cast<char*>(args.workspace) + worker * share, image, first, count, tiles, block,
                per_image);
    });
  }

  // Tiles [first, first + count) of an image, at most block_tiles() of them, as part `part` of its
  // statistics. `end` is where the image's tiles end.
  void run_block(char* workspace, int64_t image, int64_t first, int count, int64_t end, int64_t part,
                 int64_t parts) const {
    Carver carver{workspace};
    const BlockScratch scratch = carve_block(carver);
    const int64_t v_stride = v_point(block_tiles()), sums_stride = sum_stride(block_tiles());
    for_pieces(first, count, [&](int ty, int tx, int n, int64_t at) {
      for (int c0 = 0; c0 < channels; c0 += kChunk)
        transform_any_input(image, ty, tx, n, c0, min2(kChunk, channels - c0), scratch.window,
                            scratch.v + at * block_lda + elements(args, c0), block_lda, v_stride);
    });
    const int64_t products = kPoints2 * ceil_div(out_channels, kPanel) * ceil_div(depth, kDepth);
    Ahead ahead = next_windows(image, first, end, products * ceil_div(count, kFetchRows));
    for (int c0 = 0; c0 < out_channels; c0 += block_group()) {
      const int width = min2(block_group(), out_channels - c0);
      with_packed(args, [&]<class U>() {
        multiply(scratch.v, kDepth, block_lda, v_stride, count,
                 reinterpret_cast<const U*>(args.packed) + static_cast<int64_t>(c0) * depth,
                 static_cast<int64_t>(depth) * out_channels, width, scratch.sums, sums_stride, ahead);
      });
      store_any_tiles(image, first, count, c0, width, scratch.sums, sums_stride, part, parts);
    }
  }
  static constexpr int kDepth = 256;  // elements that a product accumulates in registers

  // What a thread will read after the block at tile `first`: the others are at the blocks before that one.
  Ahead next_windows(int64_t image, int64_t first, int64_t end, int64_t calls) const {
    Ahead ahead;
    const int64_t next = first + p2pfast::num_threads() * static_cast<int64_t>(block_tiles());
    if (next < end) {
      for_pieces(next, min2<int64_t>(block_tiles(), end - next), [&](int ty, int tx, int n, int64_t) {
        for (int y = 0; y < S::kWindow; ++y)
          ahead.add(args, image, S::kStepIn * ty + S::origin(args.pad_top) + y,
                    S::kStepIn * tx + S::origin(args.pad_left), S::kStepIn * (n - 1) + S::kWindow);
      });
    }
    ahead.share_among(calls, kAheadLines);
    return ahead;
  }
  static constexpr int64_t kAheadLines = 8192;
  static constexpr int kFetchRows = 8;  // of a product, for one share of the lines

  // --- driver 2: many tiles at once, output channels among the threads ----------------------------

  // For maps with few tiles and many channels: the points of all tiles are kept, and a task runs a few
  // panels of weights over them, so that weights pass by once: transformed ones, or (kSorted) such that the
  // task transforms, a fraction of the memory. Tiles are counted through the whole batch here; the statistics
  // of kGroup of them are a part.
  static constexpr int kGroup = 48;
  static constexpr int kPass = 144;
  int64_t all_tiles() const { return args.images * tiles; }
  int64_t pass_tiles() const {
    return min2<int64_t>(all_tiles(), round_up(args.block > 0 ? args.block : kPass, kGroup));
  }
  int64_t stream_parts() const { return ceil_div(all_tiles(), kGroup); }
  // The input's points are kept in chunks of the depth, so that each product reads them in order. Sorted
  // weights, a row of their points and the sums share the cache: shorter chunks.
  template <bool kSorted>
  static constexpr int stream_chunk() {
    return kSorted ? kDepth / 2 : kDepth;
  }
  template <bool kSorted>
  int64_t stream_lda() const {
    return spread(min2(depth, stream_chunk<kSorted>()));
  }
  template <bool kSorted>
  int64_t stream_point() const {
    return spread(pass_tiles() * stream_lda<kSorted>());
  }
  // Output channels of a task, fewer where the threads would not have enough tasks.
  template <bool kSorted>
  int stream_width(int threads) const {
    int width = kSorted ? max2(kPanel, min2(kSortedWidth, out_channels / kPanel * kPanel)) : block_group();
    while (width > kPanel && ceil_div(out_channels, width) < 4 * threads) width -= kPanel;
    return width;
  }
  static constexpr int kSortedWidth = 32, kSortedPanels = max2(1, kSortedWidth / kPanel);
  // Values of a panel that are sorted at a time.
  int64_t sorted_chunk() const {
    const int64_t values = args.packed_dtype == Packed::kPairs ? 2 : 1;
    return values * stream_chunk<true>() * kTaps2 * kPanel;
  }

  struct StreamScratch {
    float *window, *sorted, *u, *sums;
  };
  template <bool kSorted>
  StreamScratch carve_stream(Carver& carver) const {
    const int64_t width = kSorted ? max2(kPanel, kSortedWidth) : round_up(block_group(), kPanel);
    const int64_t u = kSorted ? S::kPoints * spread(stream_chunk<kSorted>() * width) : 0;
    const int64_t sorted = kSorted ? kSortedPanels * sorted_chunk() : 0;
    return {carver.floats(kGatherFloats), carver.floats(sorted), carver.floats(u),
            carver.floats(width / kPanel * kSums2 * sum_stride(pass_tiles()))};
  }
  template <bool kSorted>
  int64_t v_floats() const {
    return ceil_div(depth, stream_chunk<kSorted>()) * kPoints2 * stream_point<kSorted>() + kLanes;
  }
  template <bool kSorted>
  int64_t stream_workspace(int threads) const {
    Carver shared{nullptr}, own{nullptr};
    shared.floats(v_floats<kSorted>());
    carve_stream<kSorted>(own);
    return shared.used + own.used * threads;
  }

  template <bool kSorted>
  void run_stream() const {
    // A part may hold no tile of some image: its count stays zero.
    if (args.partial) std::memset(args.count, 0, sizeof(float) * args.images * stream_parts());
    run_passes<kSorted>([&](int64_t begin, int64_t end, int c, int width, const float* sums,
                            int64_t sums_stride, int) {
      for (int64_t part = begin; part < end; part += kGroup) {
        for_images(part, min2(part + kGroup, end), [&](int64_t image, int64_t first, int64_t n, int64_t at) {
          store_any_tiles(image, first, static_cast<int>(n), c, width, sums + (part - begin + at) * kPanel,
                          sums_stride, part / kGroup, stream_parts());
        });
      }
    });
  }

  // Calls store(begin, end, c, width, sums, sums_stride, worker) with the sums of tiles [begin, end) and
  // output channels [c, c + width), for every pass over the tiles and all channels.
  template <bool kSorted, class Store>
  void run_passes(Store&& store) const {
    Carver shared{static_cast<char*>(args.workspace)};
    float* const v = shared.floats(v_floats<kSorted>());
    Carver measure{nullptr};
    carve_stream<kSorted>(measure);
    const int64_t share = measure.used, lda = stream_lda<kSorted>(), v_stride = stream_point<kSorted>();
    auto own = [&](int worker) {
      Carver carver{static_cast<char*>(args.workspace) + shared.used + worker * share};
      return carve_stream<kSorted>(carver);
    };
    // Where the points of channel c begin.
    auto points = [&](int c) {
      const int64_t k = elements(args, c);
      constexpr int kChunkDepth = stream_chunk<kSorted>();
      return v + k / kChunkDepth * kPoints2 * v_stride + k % kChunkDepth;
    };
    const int64_t chunks = ceil_div(channels, kChunk), sums_stride = sum_stride(pass_tiles());
    const int task_width = stream_width<kSorted>(p2pfast::num_threads());
    for (int64_t begin = 0; begin < all_tiles(); begin += pass_tiles()) {
      const int64_t end = min2(all_tiles(), begin + pass_tiles());
      parallel_for(ceil_div(end - begin, kPiece) * chunks, [&](int64_t task, int worker) {
        const StreamScratch scratch = own(worker);
        const int c0 = static_cast<int>(task % chunks) * kChunk;
        const int64_t from = begin + task / chunks * kPiece, to = min2(end, from + kPiece);
        for_images(from, to, [&](int64_t image, int64_t first, int64_t count, int64_t at) {
          for_pieces(first, count, [&](int ty, int tx, int n, int64_t offset) {
            transform_any_input(image, ty, tx, n, c0, min2(kChunk, channels - c0), scratch.window,
                                points(c0) + (from - begin + at + offset) * lda, lda, v_stride);
          });
        });
      });
      parallel_for(ceil_div(out_channels, task_width), [&](int64_t task, int worker) {
        const StreamScratch scratch = own(worker);
        const int c = static_cast<int>(task) * task_width, width = min2(task_width, out_channels - c);
        const int count = static_cast<int>(end - begin);
        if constexpr (kSorted) {
          with_sorted(scratch.sorted, c, width, [&](auto&& taps) {
            with_transformed(scratch.u, [&](auto* u) {
              multiply_sorted(v, stream_chunk<true>(), lda, v_stride, count, taps, width, u, scratch.sums,
                              sums_stride);
            });
          });
        } else {
          Ahead nothing;
          with_packed(args, [&]<class U>() {
            multiply(v, kPoints2 * v_stride, lda, v_stride, count,
                     reinterpret_cast<const U*>(args.packed) + static_cast<int64_t>(c) * depth,
                     static_cast<int64_t>(depth) * out_channels, width, scratch.sums, sums_stride, nothing);
          });
        }
        store(begin, end, c, width, scratch.sums, sums_stride, worker);
      });
    }
  }

  // Calls f with the taps of multiply_sorted for panels [c0, c0 + width): kept ones, or sorted now.
  template <class F>
  void with_sorted(float* scratch, int c0, int width, F&& f) const {
    if (!args.packed) {
      f([=, this](int c, int channel, int count, Ahead& ahead) -> const float* {
        const int row = kTaps2 * panel_vectors(width - c) * kLanes;
        float* const to = scratch + c / kPanel * sorted_chunk();
        for (int k = 0; k < count; k += kPart)
          sort_any_weights(channel + k, min2(kPart, count - k), c0 + c, row / kTaps2 / kLanes,
                           to + static_cast<int64_t>(k) * row);
        fetch_weights(channel + count, count, c0 + c, ahead);
        return to;
      });
    } else if (args.packed_dtype == Packed::kFloat32) {
      f(kept(args.packed, c0, width));
    } else {
      f(kept(reinterpret_cast<const bf16*>(args.packed), c0, width));
    }
  }
  template <class T>
  auto kept(const T* sorted, int c0, int width) const {
    return [=, this](int c, int channel, int, Ahead&) -> const T* {
      const int columns = panel_vectors(width - c) * kLanes;
      return sorted +
             (static_cast<int64_t>(c0 + c) * channels + static_cast<int64_t>(channel) * columns) * kTaps2;
    };
  }
  // Weights of a panel that will be sorted next. Sorting exchanged ones fetches for itself.
  void fetch_weights(int k0, int count, int c, Ahead& ahead) const {
    const int64_t size = args.weight_dtype == DType::kFloat32 ? 4 : 2;
    count = min2(count, channels - k0);
    if (count <= 0 || args.weight_in_stride != kTaps2) return;
    const int end = min2(c + kPanel, args.out_channels);
    for (; c < end; ++c)
      ahead.add(static_cast<const char*>(args.weight) +
                    size * (c * args.weight_out_stride + k0 * args.weight_in_stride),
                size * count * kTaps2);
  }

  // Calls f with the place of transformed weights as what they become.
  template <class F>
  void with_transformed(float* u, F&& f) const {
    if (args.packed_dtype == Packed::kPairs) {
      f(reinterpret_cast<Pair*>(u));
    } else {
      f(u);
    }
  }

  // Splits batch-wide tiles [from, to) by image.
  template <class F>
  void for_images(int64_t from, int64_t to, F&& f) const {
    for (int64_t t = from; t < to;) {
      const int64_t image = t / tiles, first = t % tiles, count = min2(tiles - first, to - t);
      f(image, first, count, t - from);
      t += count;
    }
  }

  double multiplications() const {
    return static_cast<double>(args.images) * tiles * kPoints2 * channels * args.out_channels;
  }
};

// Calls f.template operator()<Scheme>() for the scheme of this shape with kOut outputs a tile and dimension:
// 2, 4, or 6 for 3x3 kernels of stride 1.
template <int kOut, class F>
auto with_scheme(const ConvArgs& args, F&& f) {
  if constexpr (kOut == 6) {
    return f.template operator()<Stride1<F63, 6, 3>>();
  } else {
    using Three = std::conditional_t<kOut == 4, F43, F23>;
    using Four = std::conditional_t<kOut == 4, F44, F24>;
    using Two = std::conditional_t<kOut == 4, F42, F22>;
    if (args.transposed) {
      return args.kernel_h == 3 ? f.template operator()<Transposed3<Two, kOut>>()
                                : f.template operator()<Transposed4<Two, kOut>>();
    }
    if (args.stride == 1) {
      return args.kernel_h == 3 ? f.template operator()<Stride1<Three, kOut, 3>>()
                                : f.template operator()<Stride1<Four, kOut, 4>>();
    }
    return args.kernel_h == 3 ? f.template operator()<Stride2Taps3<Two, kOut>>()
                              : f.template operator()<Stride2Taps4<Two, kOut>>();
  }
}

template <int kOut>
const char* winograd_refuses(const ConvArgs& args) {
  if (args.kernel_h != args.kernel_w) return "the kernel is not square";
  if (args.transposed && kOut == 6) return "needs 3x3 with stride 1, not transposed";
  if (args.transposed) {
    if (args.stride != 2 || args.pad_top != 1 || args.pad_left != 1)
      return "transposed needs stride 2 and padding 1";
    if (args.kernel_h != 3 && args.kernel_h != 4) return "transposed needs a 3x3 or 4x4 kernel";
    return nullptr;
  }
  if (args.stride == 1 && args.kernel_h == 3) return nullptr;
  if (kOut == 6) return "needs 3x3 with stride 1";
  if (args.stride <= 2 && (args.kernel_h == 3 || args.kernel_h == 4)) return nullptr;
  return "needs a 3x3 or 4x4 kernel with stride 1 or 2";
}

template <int kOut>
int64_t packed_floats(const ConvArgs& args) {
  return with_scheme<kOut>(args, [&]<class S>() { return Winograd<S>{args}.packed_floats(); });
}
template <int kOut>
void pack(const ConvArgs& args, float* packed) {
  with_scheme<kOut>(args, [&]<class S>() {
    with_packed(args, [&]<class U>() { Winograd<S>{args}.pack(reinterpret_cast<U*>(packed)); });
  });
}
template <int kOut>
double multiplications(const ConvArgs& args) {
  return with_scheme<kOut>(args, [&]<class S>() { return Winograd<S>{args}.multiplications(); });
}

// Blocks of tiles without those of one label, in winograd_skip.h.
template <class S>
struct Skipping;

// args.block tiles at a time, or all of them where it is 0.
template <int kOut>
constexpr ConvKernel packed_winograd() {
  return {winograd_refuses<kOut>,
          packed_floats<kOut>,
          pack<kOut>,
          [](const ConvArgs& args, int threads) {
            return with_scheme<kOut>(args, [&]<class S>() {
              const Winograd<S> w{args};
              if (args.uniform) return Skipping<S>{args}.workspace(threads);
              return args.block ? w.block_workspace(threads) : w.template stream_workspace<false>(threads);
            });
          },
          [](const ConvArgs& args) {
            return with_scheme<kOut>(args, [&]<class S>() {
              const Winograd<S> w{args};
              if (args.uniform) return Skipping<S>{args}.parts();
              return args.block ? w.blocks() : w.stream_parts();
            });
          },
          multiplications<kOut>,
          [](const ConvArgs& args) {
            with_scheme<kOut>(args, [&]<class S>() {
              const Winograd<S> w{args};
              if (args.uniform) return Skipping<S>{args}.run();
              args.block ? w.run_blocks() : w.template run_stream<false>();
            });
          }};
}

// Sorted weights, kept or not, and float32 or bfloat16.
template <int kOut>
constexpr ConvKernel streamed_winograd() {
  return {winograd_refuses<kOut>,
          [](const ConvArgs& args) {
            return with_scheme<kOut>(args, [&]<class S>() {
              const int64_t values = Winograd<S>{args}.sorted_values();
              return args.packed_dtype == Packed::kFloat32 ? values : ceil_div(values, 2);
            });
          },
          [](const ConvArgs& args, float* packed) {
            with_scheme<kOut>(args, [&]<class S>() {
              const Winograd<S> w{args};
              args.packed_dtype == Packed::kFloat32 ? w.sort(packed)
                                                    : w.sort(reinterpret_cast<bf16*>(packed));
            });
          },
          [](const ConvArgs& args, int threads) {
            return with_scheme<kOut>(
                args, [&]<class S>() { return Winograd<S>{args}.template stream_workspace<true>(threads); });
          },
          [](const ConvArgs& args) {
            return with_scheme<kOut>(args, [&]<class S>() { return Winograd<S>{args}.stream_parts(); });
          },
          multiplications<kOut>,
          [](const ConvArgs& args) {
            with_scheme<kOut>(args, [&]<class S>() { Winograd<S>{args}.template run_stream<true>(); });
          }};
}

}  // namespace p2pfast::P2PFAST_LEVEL
