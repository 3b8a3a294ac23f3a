// Few output channels (an image). Where rows.h has a scheme for the shape, that; else the taps of a kernel
// row become columns of the matrix product, so that its vectors are full, and a short sum over shifted
// columns follows. A transposed convolution folds all its taps; an ordinary one those of a kernel row,
// and accumulates over kernel rows.
#include "cpu/direct.h"
#include "cpu/rows.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int kMaxColumns = 64;
constexpr int kMaxThin = 8;  // output channels
// Folding reads four channels at a time, and so up to three values past the last.
using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

struct Thin {
  const ConvArgs& args;
  const int channels = total_channels(args);
  const Phases ys{args.kernel_h, args.stride, args.pad_top, args.transposed};
  const Phases xs{args.kernel_w, args.stride, args.pad_left, args.transposed};
  const int rows_q = static_cast<int>(ceil_div(args.out_height, ys.spread));
  const int columns_q = static_cast<int>(ceil_div(args.out_width, xs.spread));
  const int folded = (args.transposed ? args.kernel_h * args.kernel_w : args.kernel_w) * args.out_channels;
  const int passes = args.transposed ? 1 : args.kernel_h;  // products accumulated
  const int width = static_cast<int>(round_up(folded, kLanes));

  static constexpr int kVectors = kLanes == 16 ? 4 : 3;  // of a panel

  // A transposed convolution computes the products of a halo around its block, so that is squarer.
  int block_columns() const { return min2(columns_q, args.transposed ? 64 : 128); }
  int block_rows() const { return min2(rows_q, args.transposed ? 8 : 4); }
  int window_columns() const { return block_columns() + xs.high - xs.low; }
  int window_rows() const { return block_rows() + ys.high - ys.low; }
  int product_rows() const { return args.transposed ? window_rows() : block_rows(); }
  int64_t across() const { return ceil_div(columns_q, block_columns()); }
  int64_t blocks() const { return ceil_div(rows_q, block_rows()) * across(); }
  int64_t row_floats() const { return static_cast<int64_t>(window_columns()) * channels; }

  int64_t packed_floats() const { return static_cast<int64_t>(passes) * channels * width; }

  // Layout: [panel][kernel row][channel][column of the panel]; column = folded tap * Cout + co.
  template <class W>
  void pack_from(float* packed) const {
    const W* weight = static_cast<const W*>(args.weight);
    for (int c = 0; c < width; c += kVectors * kLanes) {
      const int panel = min2(kVectors * kLanes, width - c);
      for (int p = 0; p < passes; ++p) {
        for (int i = 0; i < channels; ++i) {
          for (int l = 0; l < panel; ++l) {
            const int tap = (c + l) / args.out_channels, co = (c + l) % args.out_channels;
            const int64_t at = tap_offset(args, p + tap / args.kernel_w, tap % args.kernel_w);
            *packed++ = c + l < folded
                            ? to_float(weight[co * args.weight_out_stride + i * args.weight_in_stride + at])
                            : 0.0f;
          }
        }
      }
    }
  }

  struct Scratch {
    float *window, *products, *line;
  };
  Scratch carve(Carver& carver) const {
    return {
        carver.floats(window_rows() * row_floats() + kGatherSlack),
        carver.floats(static_cast<int64_t>(product_rows()) * window_columns() * width + kMaxThin),
        carver.floats(static_cast<int64_t>(args.out_channels) * round_up(block_columns() * xs.spread, 16))};
  }
  int64_t workspace(int threads) const {
    Carver carver{nullptr};
    carve(carver);
    return carver.used * threads;
  }

  void multiply(const Scratch& scratch, int rows, int columns) const {
    const float* packed = args.packed;
    for (int c = 0; c < width; c += kVectors * kLanes) {
      const int vectors = min2(kVectors, (width - c) / kLanes);
      for (int y = 0; y < rows; ++y) {
        for (int p = 0; p < passes; ++p) {
          const float* window = scratch.window + (y + p) * row_floats();
          const float* b = packed + static_cast<int64_t>(p) * channels * vectors * kLanes;
          gemm_panel(
              vectors, columns, [&](int m) { return window + static_cast<int64_t>(m) * channels; }, b,
              scratch.products + static_cast<int64_t>(y) * window_columns() * width + c, width, channels,
              p > 0, b);
        }
      }
      packed += static_cast<int64_t>(passes) * channels * vectors * kLanes;
    }
  }

  // One output row: sums of shifted products into line[co][x].
  void fold(const Scratch& scratch, int y, const Phase& py, int columns, int64_t line_stride) const {
    const int taps_y = args.transposed ? py.taps : 1, fours = (args.out_channels + 3) / 4;
    for (int b = 0; b < xs.count; ++b) {
      const Phase& px = xs.phase[b];
      for (int x = 0; x < columns; ++x) {
        Four sum[kMaxThin / 4] = {};
        for (int jy = 0; jy < taps_y; ++jy) {
          const int row = args.transposed ? y + py.offset - ys.low + jy : y;
          const int tap_row = args.transposed ? py.tap[jy] * args.kernel_w : 0;
          for (int jx = 0; jx < px.taps; ++jx) {
            const float* from =
                scratch.products +
                (static_cast<int64_t>(row) * window_columns() + x + px.offset - xs.low + jx) * width +
                (tap_row + px.tap[jx]) * args.out_channels;
            for (int g = 0; g < fours; ++g) sum[g] += *reinterpret_cast<const Four*>(from + 4 * g);
          }
        }
        for (int co = 0; co < args.out_channels; ++co)
          scratch.line[co * line_stride + x * xs.spread + px.first] =
              sum[co / 4][co % 4] + (args.bias ? args.bias[co] : 0.0f);
      }
    }
  }

  template <class T>
  void store_line(const Scratch& scratch, int64_t image, int oy, int ox, int columns,
                  int64_t line_stride) const {
    for (int co = 0; co < args.out_channels; ++co) {
      float* line = scratch.line + co * line_stride;
      for (int x = 0; x < columns; x += kLanes) store(line + x, finish(load(line + x), args.act, args.slope));
      T* to = static_cast<T*>(args.out.data) + image * args.out.image_stride + oy * args.out.row_stride +
              ox * args.out.pixel_stride + co * args.out.channel_stride;
      for (int x = 0; x < columns; ++x) put(to + x * args.out.pixel_stride, line[x]);
    }
  }

  void run() const {
    const int64_t per_image = blocks(), share = workspace(1);
    parallel_for(args.images * per_image, [&](int64_t task, int worker) {
      Carver carver{static_cast<char*>(args.workspace) + worker * share};
      const Scratch scratch = carve(carver);
      const int64_t image = task / per_image, block = task % per_image;
      const int q0 = static_cast<int>(block / across()) * block_rows();
      const int r0 = static_cast<int>(block % across()) * block_columns();
      const int rows = min2(block_rows(), rows_q - q0), columns = min2(block_columns(), columns_q - r0);
      const int halo_y = ys.high - ys.low, halo_x = xs.high - xs.low;
      gather(args, image, q0 + ys.low, rows + halo_y, r0 + xs.low, columns + halo_x, 0, channels,
             scratch.window, channels, row_floats());
      multiply(scratch, args.transposed ? rows + halo_y : rows, columns + halo_x);
      const int64_t line_stride = round_up(block_columns() * xs.spread, 16);
      const int ox = r0 * xs.spread, valid = min2(columns * xs.spread, args.out_width - ox);
      for (int y = 0; y < rows; ++y) {
        for (int a = 0; a < ys.count; ++a) {
          const int oy = (q0 + y) * ys.spread + ys.phase[a].first;
          if (oy >= args.out_height) continue;
          fold(scratch, y, ys.phase[a], columns, line_stride);
          auto store = args.out.dtype == DType::kFloat32 ? &Thin::store_line<float> : &Thin::store_line<bf16>;
          (this->*store)(scratch, image, oy, ox, valid, line_stride);
        }
      }
    });
  }

  double multiplications() const {
    return static_cast<double>(args.images) * rows_q * columns_q * passes * channels * folded;
  }
};

const char* thin_refuses(const ConvArgs& args) {
  if (const char* reason = direct_refuses(args)) return reason;
  if (args.out_channels > kMaxThin) return "more than 8 output channels";
  if (!args.transposed && args.stride != 1) return "needs stride 1";
  const int taps = args.transposed ? args.kernel_h * args.kernel_w : args.kernel_w;
  if (taps * args.out_channels > kMaxColumns) return "more than 64 folded columns";
  if (args.partial) return "statistics of the output are not gathered";
  return nullptr;
}

// f(kernel) of the implementation for this shape.
template <class F>
auto with_thin(const ConvArgs& args, F&& f) {
  decltype(f(Thin{args})) result{};
  if (!with_rows(args, [&]<class S>() { result = f(Rows<S>{args}); })) result = f(Thin{args});
  return result;
}

}  // namespace

const ConvKernel conv_thin = {
    thin_refuses,
    [](const ConvArgs& args) { return with_thin(args, [](const auto& k) { return k.packed_floats(); }); },
    [](const ConvArgs& args, float* packed) {
      with_thin(args, [&](const auto& k) {
        if (args.weight_dtype == DType::kFloat32) {
          k.template pack_from<float>(packed);
        } else {
          k.template pack_from<bf16>(packed);
        }
        return 0;
      });
    },
    [](const ConvArgs& args, int threads) {
      return with_thin(args, [&](const auto& k) { return k.workspace(threads); });
    },
    [](const ConvArgs&) { return int64_t{1}; },
    [](const ConvArgs& args) { return with_thin(args, [](const auto& k) { return k.multiplications(); }); },
    [](const ConvArgs& args) { with_thin(args, [](const auto& k) { return k.run(), 0; }); },
};

}  // namespace p2pfast::P2PFAST_LEVEL
