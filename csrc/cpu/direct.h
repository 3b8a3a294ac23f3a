// Convolution as an implicit matrix product: a window of input rows is gathered once, and because
// channels are innermost, the taps of one kernel row are one contiguous run of the product's depth.
// A transposed convolution is `stride` x `stride` phases, each an ordinary one on the same window.
#pragma once

#include "cpu/conv.h"
#include "cpu/epilogue.h"
#include "cpu/gather.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kMaxTaps = 16;   // of a kernel side
inline constexpr int kMaxPhases = 4;  // of one dimension

// One dimension of one phase: output kStep * q + first reads inputs q * step + offset + j, j < taps,
// with kernel tap tap[j].
struct Phase {
  int taps, offset, first;
  int tap[kMaxTaps];
};

struct Phases {
  int count, step, spread;  // output spacing within a phase
  int low, high;            // smallest and largest input offset over the phases
  Phase phase[kMaxPhases];

  Phases(int kernel, int stride, int pad, bool transposed) {
    if (!transposed) {
      count = 1, step = stride, spread = 1;
      phase[0] = {kernel, -pad, 0, {}};
      for (int j = 0; j < kernel; ++j) phase[0].tap[j] = j;
    } else {
      count = stride, step = 1, spread = stride;
      for (int r = 0; r < stride; ++r) {
        Phase& p = phase[r];
        p = {0, 0, r, {}};
        int largest = -1;
        for (int k = (r + pad) % stride; k < kernel; k += stride) largest = k;
        for (int k = largest; k >= 0; k -= stride) p.tap[p.taps++] = k;
        if (p.taps) p.offset = (r + pad - largest) / stride;
        if (p.taps && (r + pad - largest) % stride != 0) p.taps = 0;  // cannot happen: same residue
      }
    }
    low = 1 << 20, high = -(1 << 20);
    for (int r = 0; r < count; ++r) {
      if (phase[r].taps == 0) continue;
      low = min2(low, phase[r].offset);
      high = max2(high, phase[r].offset + phase[r].taps - 1);
    }
    if (low > high) low = high = 0;
  }
};

struct Direct {
  const ConvArgs& args;
  const int channels = total_channels(args);
  const int out_channels = static_cast<int>(round_up(args.out_channels, kLanes));
  const Phases ys{args.kernel_h, args.stride, args.pad_top, args.transposed};
  const Phases xs{args.kernel_w, args.stride, args.pad_left, args.transposed};
  const int rows_q = static_cast<int>(ceil_div(args.out_height, ys.spread));
  const int columns_q = static_cast<int>(ceil_div(args.out_width, xs.spread));
  static constexpr int kDepth = kMaxDepth;
  // Elements of a pixel of the window. Pairs do not reach from one pixel into the next, unless the window is
  // written out (see expanded()) and rounded then.
  const int pixel = static_cast<int>(expanded() ? channels : elements(args, channels));
  const bool rounded = args.packed_dtype == Packed::kPairs;

  int block_columns() const { return min2(columns_q, 48); }
  int window_columns() const { return (block_columns() - 1) * xs.step + xs.high - xs.low + 1; }
  // Rows of a block: as many as keep the window near `block` floats (default: half a megabyte of L2).
  int block_rows() const {
    const int64_t target = args.block > 0 ? args.block : 98304;
    const int64_t row = static_cast<int64_t>(window_columns()) * pixel;
    const int64_t window_rows = max2<int64_t>(1, target / row);
    const int64_t rows = (window_rows - (ys.high - ys.low + 1)) / ys.step + 1;
    return static_cast<int>(max2<int64_t>(1, min2<int64_t>(min2<int64_t>(rows, 8), rows_q)));
  }
  int window_rows() const { return (block_rows() - 1) * ys.step + ys.high - ys.low + 1; }
  int64_t across() const { return ceil_div(columns_q, block_columns()); }
  int64_t blocks() const { return ceil_div(rows_q, block_rows()) * across(); }
  // Output channels of a task: few blocks are split further, so that all threads have work.
  int group() const {
    int64_t wanted = args.group > 0 ? args.group : out_channels;
    const int64_t enough = 2 * p2pfast::num_threads(), tasks = args.images * blocks();
    while (wanted > kPanel && tasks * ceil_div(out_channels, wanted) < enough)
      wanted = round_up(wanted / 2, kPanel);
    return static_cast<int>(min2<int64_t>(out_channels, round_up(wanted, kPanel)));
  }

  int64_t packed_floats() const { return packed_size(args, depth() * out_channels); }

  // Calls f(phase_y, phase_x, elements before it within a column).
  template <class F>
  void for_phases(F&& f) const {
    int64_t taps = 0;
    for (int a = 0; a < ys.count; ++a) {
      for (int b = 0; b < xs.count; ++b) {
        f(ys.phase[a], xs.phase[b], taps * pixel);
        taps += static_cast<int64_t>(ys.phase[a].taps) * xs.phase[b].taps;
      }
    }
  }
  // Depth of the product of all phases together: values, and elements.
  int64_t values() const { return static_cast<int64_t>(args.kernel_h) * args.kernel_w * channels; }
  int64_t depth() const {
    return expanded() ? elements(args, values())
                      : static_cast<int64_t>(args.kernel_h) * args.kernel_w * pixel;
  }

  template <class W, class B>
  void pack_from(B* packed) const {
    const W* weight = static_cast<const W*>(args.weight);
    parallel_for(ceil_div(out_channels, kPanel), [&](int64_t panel, int) {
      const int c = static_cast<int>(panel) * kPanel, width = min2(kPanel, out_channels - c);
      B* base = packed + static_cast<int64_t>(c) * depth();
      if (kValues<B> > 1) std::memset(base, 0, sizeof(B) * static_cast<size_t>(depth() * width));
      for_phases([&](const Phase& py, const Phase& px, int64_t before) {
        B* to = base + before * width;
        int64_t k = 0;
        for (int jy = 0; jy < py.taps; ++jy) {
          for (int jx = 0; jx < px.taps; ++jx) {
            for (int i = 0; i < channels; ++i, ++k) {
              const W* w = weight + i * args.weight_in_stride + tap_offset(args, py.tap[jy], px.tap[jx]);
              for (int l = 0; l < width; ++l)
                set_value(to, width, k, l,
                          c + l < args.out_channels ? to_float(w[(c + l) * args.weight_out_stride]) : 0.0f);
            }
            if (!expanded()) k = round_up(k, kValues<B>);
          }
        }
      });
    });
  }

  // With few channels a kernel row is too short a run for the product: the window of each pixel is written
  // out as one row of all taps.
  bool expanded() const {
    return ys.count == 1 && xs.count == 1 && args.kernel_h > 1 && values() <= kDepth &&
           args.kernel_w * channels < 48;
  }
  int64_t expanded_row() const { return round_up(depth(), kLanes); }

  struct Scratch {
    float *window, *sums, *taps;
  };
  Scratch carve(Carver& carver) const {
    const int64_t pixels = static_cast<int64_t>(block_rows()) * block_columns();
    return {carver.floats(static_cast<int64_t>(window_rows()) * window_columns() * pixel + kGatherSlack),
            carver.floats(pixels * kPanel),
            carver.floats(expanded() ? pixels * expanded_row() + kGatherSlack : 0)};
  }

  template <class To>
  void expand(const Scratch& scratch, int rows, int columns, int64_t row_floats) const {
    const int run = args.kernel_w * channels;
    for (int y = 0; y < rows; ++y) {
      for (int x = 0; x < columns; ++x) {
        To* to =
            reinterpret_cast<To*>(scratch.taps + (static_cast<int64_t>(y) * columns + x) * expanded_row());
        const float* from =
            scratch.window + static_cast<int64_t>(y) * ys.step * row_floats + x * xs.step * channels;
        // Whole vectors: what goes past a run is overwritten by the next, and not read after the last.
        for (int j = 0; j < args.kernel_h; ++j, to += run, from += row_floats)
          for (int i = 0; i < run; i += kLanes) store(to + i, load(from + i));
        if constexpr (sizeof(To) == 2) *to = 0;  // what the last pair may lack
      }
    }
  }
  int64_t workspace(int threads) const {
    Carver carver{nullptr};
    carve(carver);
    return carver.used * threads;
  }

  // One row of a full panel where channels are innermost.
  template <class T, int kVectors>
  void store_plain_row(const float* from, T* to, int64_t step, int columns, const Vec* bias, bool streaming,
                       Moments* moments) const {
    Vec shift[kVectors], sum[kVectors], squares[kVectors], b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      b[v] = bias[v];
      shift[v] = moments[v].count ? moments[v].shift : load(from + v * kLanes) + b[v];
      sum[v] = squares[v] = Vec{};
    }
    for (int x = 0; x < columns; ++x, from += kVectors * kLanes, to += step) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec value = load(from + v * kLanes) + b[v];
        const Vec d = value - shift[v];
        sum[v] += d;
        squares[v] += d * d;
        const Vec result = args.act == Act::kNone ? value : finish(value, args.act, args.slope);
        if constexpr (kPanel * sizeof(T) % 64 == 0) {  // whole lines
          if (streaming) {
            stream(to + v * kLanes, result);
            continue;
          }
        }
        store(to + v * kLanes, result);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) moments[v].add_sums(shift[v], sum[v], squares[v], columns);
  }

  template <class T>
  void store_rows(const float* sums, int width, int vectors, int64_t image, int q0, int rows, int r0,
                  int columns, const Phase& py, const Phase& px, int c, Moments* moments) const {
    Vec bias[kPanelVectors];
    for (int v = 0; v < vectors; ++v) {
      bias[v] = Vec{};
      for (int l = 0; args.bias && l < kLanes && c + v * kLanes + l < args.out_channels; ++l)
        bias[v][l] = args.bias[c + v * kLanes + l];
    }
    const int ox0 = r0 * xs.spread + px.first;
    const int inside =
        static_cast<int>(min2<int64_t>(columns, ceil_div(max2(0, args.out_width - ox0), xs.spread)));
    const bool plain = args.out.channel_stride == 1 && c + width <= args.out.pixel_stride &&
                       vectors == kPanelVectors && inside > 0;
    const bool streaming = plain && xs.spread == 1 && streams(args);
    for (int y = 0; y < rows; ++y) {
      const int oy = (q0 + y) * ys.spread + py.first;
      if (oy >= args.out_height) break;
      T* row = static_cast<T*>(args.out.data) + image * args.out.image_stride + oy * args.out.row_stride;
      const float* from = sums + static_cast<int64_t>(y) * columns * width;
      if (plain) {
        store_plain_row<T, kPanelVectors>(from, row + ox0 * args.out.pixel_stride + c,
                                          xs.spread * args.out.pixel_stride, inside, bias, streaming,
                                          moments);
        continue;
      }
      for (int x = 0; x < inside; ++x, from += width) {
        for (int v = 0; v < vectors; ++v) {
          const Vec value = load(from + v * kLanes) + bias[v];
          if (args.partial) moments[v].add(value);
          put_vector(args, row + (ox0 + x * xs.spread) * args.out.pixel_stride, c + v * kLanes,
                     finish(value, args.act, args.slope));
        }
      }
      for (int v = 0; args.partial && v < vectors; ++v) moments[v].settle();
    }
    if (streaming) finish_streams();
  }

  // The window of a block; `step` and `line` are its pixel's and its row's strides.
  template <class To>
  void fill(To* window, int64_t image, int q0, int rows, int r0, int columns, int64_t step,
            int64_t line) const {
    const int high = (rows - 1) * ys.step + ys.high - ys.low + 1;
    const int wide = (columns - 1) * xs.step + xs.high - xs.low + 1;
    gather(args, image, static_cast<int64_t>(q0) * ys.step + ys.low, high,
           static_cast<int64_t>(r0) * xs.step + xs.low, wide, 0, channels, window, step, line);
    if (step == channels) return;
    for (int y = 0; y < high; ++y)
      for (int x = 0; x < wide; ++x) window[y * line + x * step + channels] = To{};
  }

  void run() const {
    const int64_t per_image = blocks();
    const int64_t groups = ceil_div(out_channels, group());
    const int64_t share = workspace(1);
    const int64_t row_floats = static_cast<int64_t>(window_columns()) * pixel;
    parallel_for(args.images * per_image * groups, [&](int64_t task, int worker) {
      Carver carver{static_cast<char*>(args.workspace) + worker * share};
      const Scratch scratch = carve(carver);
      const int64_t g = task % groups, at = task / groups, image = at / per_image, block = at % per_image;
      const int q0 = static_cast<int>(block / across()) * block_rows();
      const int r0 = static_cast<int>(block % across()) * block_columns();
      const int rows = min2(block_rows(), rows_q - q0), columns = min2(block_columns(), columns_q - r0);
      if (rounded && !expanded()) {
        fill(reinterpret_cast<bf16*>(scratch.window), image, q0, rows, r0, columns, 2 * pixel,
             2 * row_floats);
      } else {
        fill(scratch.window, image, q0, rows, r0, columns, pixel, row_floats);
      }
      if (expanded())
        rounded ? expand<bf16>(scratch, rows, columns, row_floats)
                : expand<float>(scratch, rows, columns, row_floats);
      const int end = min2(out_channels, static_cast<int>(g + 1) * group());
      for (int c = static_cast<int>(g) * group(); c < end; c += kPanel) {
        const int vectors = min2(kPanelVectors, (out_channels - c) / kLanes), width = vectors * kLanes;
        Moments moments[kPanelVectors];
        for_phases([&](const Phase& py, const Phase& px, int64_t before) {
          with_packed(args, [&]<class B>() {
            const B* packed = reinterpret_cast<const B*>(args.packed);
            multiply(scratch, packed + static_cast<int64_t>(c) * depth() + before * width, rows, columns,
                     vectors, py, px, row_floats);
          });
          auto store =
              args.out.dtype == DType::kFloat32 ? &Direct::store_rows<float> : &Direct::store_rows<bf16>;
          (this->*store)(scratch.sums, width, vectors, image, q0, rows, r0, columns, py, px, c, moments);
        });
        if (!args.partial) continue;
        const int stride = stats_stride(args);
        float* partial = args.partial + (image * per_image + block) * 2 * stride + c;
        for (int v = 0; v < vectors; ++v)
          moments[v].write(partial + v * kLanes, partial + stride + v * kLanes);
        if (c == 0) args.count[image * per_image + block] = static_cast<float>(moments[0].count);
      }
    });
  }

  // sums[row][column][width] of one phase.
  template <class B>
  void multiply(const Scratch& scratch, const B* packed, int rows, int columns, int vectors, const Phase& py,
                const Phase& px, int64_t row_floats) const {
    using A = Factor<B>;
    const int width = vectors * kLanes, run = px.taps * pixel;
    const B* weights = packed;
    if (expanded()) {
      auto row = [&](int m) { return reinterpret_cast<const A*>(scratch.taps) + m * expanded_row(); };
      gemm_panel(vectors, rows * columns, row, packed, scratch.sums, width, static_cast<int>(depth()), false,
                 packed + depth() * width);
      return;
    }
    if (py.taps == 0 || px.taps == 0) {
      std::memset(scratch.sums, 0, sizeof(float) * rows * columns * width);
      return;
    }
    const int64_t step = static_cast<int64_t>(xs.step) * pixel, line = ys.step * row_floats;
    for (int jy = 0; jy < py.taps; ++jy) {
      const A* corner = reinterpret_cast<const A*>(scratch.window) + (py.offset - ys.low + jy) * row_floats +
                        static_cast<int64_t>(px.offset - xs.low) * pixel;
      for (int k = 0; k < run; k += kDepth) {
        const int depth = min2(kDepth, run - k);
        const B* now = weights;
        weights += static_cast<int64_t>(depth) * width;
        const bool fresh = jy == 0 && k == 0;
        // Pixels of all rows of the block, so that the rows of a small map fill the registers together.
        int y = 0, x = 0, at = 0;
        auto row = [&](int m) {
          for (; at < m; ++at) {
            if (++x == columns) x = 0, ++y;
          }
          return corner + y * line + x * step + k;
        };
        gemm_panel(vectors, rows * columns, row, now, scratch.sums, width, depth, !fresh, weights);
      }
    }
  }

  double multiplications() const {
    const double positions = static_cast<double>(args.images) * rows_q * columns_q;
    return positions * values() * args.out_channels;
  }
};

inline const char* direct_refuses(const ConvArgs& args) {
  if (args.kernel_h > kMaxTaps || args.kernel_w > kMaxTaps)
    return "kernels above 16x16 are left to the library";
  if (args.transposed && args.stride > kMaxPhases)
    return "transposed strides above 4 are left to the library";
  return nullptr;
}

}  // namespace p2pfast::P2PFAST_LEVEL
