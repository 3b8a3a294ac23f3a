#include "cpu/weight_gradient.h"

#include "cpu/epilogue.h"
#include "cpu/gather.h"
#include "cpu/gemm_tn.h"
#include "cpu/parallel.h"
#include "cpu/toom_adjoint.h"
#include "cpu/winograd.h"
#include "cpu/workspace.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

// The gradient as the input of a gather: zero outside.
ConvArgs as_input(const WeightGradientArgs& args) {
  ConvArgs a{};
  a.source[0] = args.grad;
  a.sources = 1;
  a.images = args.conv.images;
  a.height = args.conv.out_height;
  a.width = args.conv.out_width;
  a.pad = Pad::kZero;
  return a;
}

template <class T>
void put_run(T* to, const float* from, int64_t n, bool streaming) {
  int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; streaming && i + kLanes <= n; i += kLanes) stream(to + i, load(from + i));
  }
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) put(to + i, from[i]);
}

// Weights that are stored past the caches: too many to be there when they are read next.
bool streams(const WeightGradientArgs& args, int64_t floats) {
  return args.out_dtype == DType::kFloat32 && floats * 4 > kStreamedBytes &&
         reinterpret_cast<uintptr_t>(args.out) % 64 == 0;
}

// --- minimal filtering ---------------------------------------------------------------------------

// A convolution by minimal filtering is y = A' [(G w) * (B' x)]; its transpose in w is
// dw = G' [sum over tiles of (A dy) * (B' x)]. S is the scheme of the convolution itself.
template <class S>
struct MinimalGradient {
  using W = Winograd<S>;
  static constexpr int kPoints2 = W::kPoints2, kSums2 = W::kSums2, kTaps2 = W::kTaps2;
  static constexpr int kColumns =
      kVectorsTn * kLanes > 32 ? kVectorsTn * kLanes : 32;   // input channels of a block
  static constexpr int kMostRows = kPoints2 > 40 ? 24 : 48;  // output channels of a block
  static constexpr int kChunk = 512;                         // tiles at a time

  const WeightGradientArgs& args;
  const W window{args.conv};
  const ConvArgs grad = as_input(args);
  const int channels = total_channels(args.conv), outputs = args.conv.out_channels;
  const int64_t tiles = args.conv.images * window.tiles;
  const int rows = block_rows();
  const int64_t column_blocks = ceil_div(channels, kColumns), row_blocks = ceil_div(outputs, rows);
  const int64_t chunk = min2<int64_t>(kChunk, tiles);
  const int64_t z_row = round_up(rows, 16);
  const int64_t v_point = spread(chunk * kColumns), z_point = spread(chunk * z_row);
  const int64_t v_block = kPoints2 * v_point, z_block = kSums2 * z_point;
  const int64_t p_point = spread(static_cast<int64_t>(rows) * kColumns), p_block = kPoints2 * p_point;

  // Even blocks, and at least four tasks where the channels allow.
  int block_rows() const {
    int n = even(ceil_div(args.conv.out_channels, kMostRows));
    const int64_t columns = ceil_div(total_channels(args.conv), kColumns);
    while (n > 2 * kRowsTn && columns * ceil_div(args.conv.out_channels, n) < 4)
      n = static_cast<int>(round_up(n / 2, kRowsTn));
    return n;
  }
  int even(int64_t blocks) const {
    return static_cast<int>(round_up(ceil_div(args.conv.out_channels, blocks), kRowsTn));
  }

  struct Shared {
    float *v, *z, *p;
  };
  bool once() const { return tiles <= chunk; }
  Shared carve_shared(Carver& carver) const {
    return {carver.floats(column_blocks * v_block + 16), carver.floats(row_blocks * z_block + 16),
            carver.floats(once() ? 0 : column_blocks * row_blocks * p_block)};
  }
  struct Own {
    float *window, *p;
  };
  Own carve_own(Carver& carver) const {
    return {carver.floats(W::kGatherFloats + S::kStepOut * S::kStepOut * W::kPiece * z_row),
            carver.floats(once() ? p_block : 0)};
  }
  int64_t workspace(int threads) const {
    Carver shared{nullptr}, own{nullptr};
    carve_shared(shared);
    carve_own(own);
    return shared.used + own.used * threads;
  }

  struct Adjoint {
    static constexpr double at(int sum, int out) { return output_at<S>(out, sum); }
  };
  // `count` tiles of a row of tiles, output channels [c0, c0 + n), into z[sum * z_point + tile * z_row +
  // ...].
  void transform_gradient(int64_t image, int tile_y, int tile_x, int count, int c0, int n, float* scratch,
                          float* z) const {
    constexpr int kStep = S::kStepOut;
    const int64_t line = static_cast<int64_t>(kStep) * count * n;
    gather(grad, image, static_cast<int64_t>(tile_y) * kStep, kStep, static_cast<int64_t>(tile_x) * kStep,
           kStep * count, c0, n, scratch, n, line);
    for (int t = 0; t < count; ++t) {
      const float* from = scratch + static_cast<int64_t>(t) * kStep * n;
      for (int c = 0; c < n; c += kLanes) {
        Vec half[S::kSums * kStep];
#pragma GCC unroll 4
        for (int x = 0; x < kStep; ++x) {
          Vec column[kStep];
#pragma GCC unroll 4
          for (int y = 0; y < kStep; ++y) column[y] = load(from + y * line + x * n + c);
          apply_matrix<Adjoint, S::kSums, kStep>(column, 1, half + x, kStep);
        }
        float* to = z + t * z_row + c;
#pragma GCC unroll 10
        for (int i = 0; i < S::kSums; ++i) {
          Vec row[S::kSums];
          apply_matrix<Adjoint, S::kSums, kStep>(half + i * kStep, 1, row, 1);
#pragma GCC unroll 10
          for (int j = 0; j < S::kSums; ++j) store(to + (i * S::kSums + j) * z_point, row[j]);
        }
      }
    }
  }

  struct WeightAdjoint {
    static constexpr double at(int tap, int point) { return S::weight(point, tap); }
  };
  template <class T>
  void finish_block(const float* p, int o0, int count, int i0, int n) const {
    T* const out = static_cast<T*>(args.out);
    for (int o = 0; o < count; ++o) {
      for (int c = 0; c < n; c += kLanes) {
        const float* from = p + static_cast<int64_t>(o) * kColumns + c;
        Vec half[S::kTaps * S::kPoints];
#pragma GCC unroll 10
        for (int j = 0; j < S::kPoints; ++j) {
          Vec column[S::kPoints];
#pragma GCC unroll 10
          for (int i = 0; i < S::kPoints; ++i) column[i] = load(from + (i * S::kPoints + j) * p_point);
          apply_matrix<WeightAdjoint, S::kTaps, S::kPoints>(column, 1, half + j, S::kPoints);
        }
        alignas(64) float taps[kTaps2 * kLanes];
#pragma GCC unroll 4
        for (int y = 0; y < S::kTaps; ++y) {
          Vec row[S::kTaps];
          apply_matrix<WeightAdjoint, S::kTaps, S::kPoints>(half + y * S::kPoints, 1, row, 1);
#pragma GCC unroll 4
          for (int x = 0; x < S::kTaps; ++x) store(taps + (y * S::kTaps + x) * kLanes, row[x]);
        }
        T* to = out + (static_cast<int64_t>(o0 + o) * channels + i0 + c) * kTaps2;
        const int lanes = min2(kLanes, n - c);
        for (int l = 0; l < lanes; ++l, to += kTaps2) {
#pragma GCC unroll 16
          for (int t = 0; t < kTaps2; ++t) put(to + t, taps[t * kLanes + l]);
        }
      }
    }
  }

  void run() const {
    Carver carver{static_cast<char*>(args.workspace)};
    const Shared shared = carve_shared(carver);
    Carver measure{nullptr};
    carve_own(measure);
    const int64_t share = measure.used;
    auto own = [&](int worker) {
      Carver mine{static_cast<char*>(args.workspace) + carver.used + worker * share};
      return carve_own(mine);
    };
    auto finish = args.out_dtype == DType::kFloat32 ? &MinimalGradient::finish_block<float>
                                                    : &MinimalGradient::finish_block<bf16>;
    for (int64_t begin = 0; begin < tiles; begin += chunk) {
      const int64_t end = min2(tiles, begin + chunk), pieces = ceil_div(end - begin, W::kPiece);
      const int64_t blocks = column_blocks + row_blocks;
      parallel_for(pieces * blocks, [&](int64_t task, int worker) {
        float* const scratch = own(worker).window;
        const int64_t block = task % blocks, from = begin + task / blocks * W::kPiece;
        const int64_t to = min2(end, from + W::kPiece);
        window.for_images(from, to, [&](int64_t image, int64_t first, int64_t count, int64_t at) {
          window.for_pieces(first, count, [&](int ty, int tx, int n, int64_t offset) {
            const int64_t tile = from - begin + at + offset;
            if (block < column_blocks) {
              const int c0 = static_cast<int>(block) * kColumns;
              window.transform_input(image, ty, tx, n, c0, min2(kColumns, channels - c0), scratch,
                                     shared.v + block * v_block + tile * kColumns, kColumns, v_point);
            } else {
              const int64_t b = block - column_blocks;
              const int c0 = static_cast<int>(b) * rows;
              transform_gradient(image, ty, tx, n, c0, min2(rows, outputs - c0), scratch,
                                 shared.z + b * z_block + tile * z_row);
            }
          });
        });
      });
      parallel_for(column_blocks * row_blocks, [&](int64_t task, int worker) {
        const int64_t column = task % column_blocks, row = task / column_blocks;
        const int i0 = static_cast<int>(column) * kColumns, n = min2(kColumns, channels - i0);
        const int o0 = static_cast<int>(row) * rows, count = min2(rows, outputs - o0);
        float* const p = once() ? own(worker).p : shared.p + task * p_block;
        for (int i = 0; i < S::kPoints; ++i) {
          for (int j = 0; j < S::kPoints; ++j) {
            const int point = i * S::kPoints + j, sum = S::sum_of(i) * S::kSums + S::sum_of(j);
            gemm_tn(count, n, shared.z + row * z_block + sum * z_point, z_row,
                    shared.v + column * v_block + point * v_point, kColumns, p + point * p_point, kColumns,
                    static_cast<int>(end - begin), begin > 0);
          }
        }
        if (end == tiles) (this->*finish)(p, o0, count, i0, n);
      });
    }
  }
};

template <class F>
auto with_forward_scheme(const ConvArgs& args, F&& f) {
  if (args.stride == 1) {
    return args.kernel_h == 3 ? f.template operator()<Stride1<F43, 4, 3>>()
                              : f.template operator()<Stride1<F44, 4, 4>>();
  }
  return args.kernel_h == 3 ? f.template operator()<Stride2Taps3<F42, 4>>()
                            : f.template operator()<Stride2Taps4<F42, 4>>();
}

const char* minimal_refuses(const WeightGradientArgs& args) {
  const ConvArgs& a = args.conv;
  const bool square = a.kernel_h == a.kernel_w && (a.kernel_h == 3 || a.kernel_h == 4);
  return square && (a.stride == 1 || a.stride == 2) ? nullptr : "needs 3x3 or 4x4 with stride 1 or 2";
}

// --- few pixels ----------------------------------------------------------------------------------

struct Taps {
  static constexpr int kDepth = 256;  // pixels at a time
  static constexpr int kMostRows = 512;

  const WeightGradientArgs& args;
  const ConvArgs grad = as_input(args);
  const int channels = total_channels(args.conv), outputs = args.conv.out_channels;
  const int taps = args.conv.kernel_h * args.conv.kernel_w;
  const int64_t pixels = static_cast<int64_t>(args.conv.images) * args.conv.out_height * args.conv.out_width;
  const int block = taps % 16 == 0 ? 8 : 16;  // input channels of a task: whole vectors of columns
  const int columns = block * taps;
  const int rows = min2(kMostRows, outputs);
  const int64_t row_blocks = ceil_div(outputs, rows), column_blocks = ceil_div(channels, block);
  const int64_t depth = min2<int64_t>(kDepth, pixels);

  struct Own {
    float *window, *b, *c;
  };
  Own carve_own(Carver& carver) const {
    return {carver.floats(static_cast<int64_t>(taps) * block + kGatherSlack), carver.floats(depth * columns),
            carver.floats(static_cast<int64_t>(rows) * columns)};
  }
  float* carve_shared(Carver& carver) const { return carver.floats(pixels * outputs + kGatherSlack); }
  int64_t workspace(int threads) const {
    Carver shared{nullptr}, own{nullptr};
    carve_shared(shared);
    carve_own(own);
    return shared.used + own.used * threads;
  }

  // The windows of pixels [first, first + count), channels [c0, c0 + n): b[pixel][channel][tap].
  void expand(int64_t first, int64_t count, int c0, int n, float* window, float* b) const {
    const ConvArgs& a = args.conv;
    const int64_t per_image = static_cast<int64_t>(a.out_height) * a.out_width;
    for (int64_t p = 0; p < count; ++p, b += columns) {
      const int64_t image = (first + p) / per_image, at = (first + p) % per_image;
      gather(a, image, at / a.out_width * a.stride - a.pad_top, a.kernel_h,
             at % a.out_width * a.stride - a.pad_left, a.kernel_w, c0, n, window, block,
             static_cast<int64_t>(a.kernel_w) * block);
      for (int c = 0; c < n; ++c) {
        for (int t = 0; t < taps; ++t) b[c * taps + t] = window[t * block + c];
      }
      for (int i = n * taps; i < columns; ++i) b[i] = 0.0f;
    }
  }

  void run() const {
    Carver carver{static_cast<char*>(args.workspace)};
    float* const g = carve_shared(carver);
    Carver measure{nullptr};
    carve_own(measure);
    const int64_t share = measure.used, lines = static_cast<int64_t>(grad.images) * grad.height;
    const int64_t line = static_cast<int64_t>(grad.width) * outputs;
    // One line after the other: a gather may write a little past its end.
    for (int64_t y = 0; y < lines; ++y)
      gather(grad, y / grad.height, y % grad.height, 1, 0, grad.width, 0, outputs, g + y * line, outputs,
             line);
    const int64_t stride = static_cast<int64_t>(channels) * taps;
    const bool streaming = streams(args, outputs * stride) && taps % 16 == 0;
    parallel_for(column_blocks * row_blocks, [&](int64_t task, int worker) {
      Carver mine{static_cast<char*>(args.workspace) + carver.used + worker * share};
      const Own own = carve_own(mine);
      const int c0 = static_cast<int>(task % column_blocks) * block, n = min2(block, channels - c0);
      const int o0 = static_cast<int>(task / column_blocks) * rows, count = min2(rows, outputs - o0);
      for (int64_t k = 0; k < pixels; k += depth) {
        const int64_t now = min2(depth, pixels - k);
        expand(k, now, c0, n, own.window, own.b);
        gemm_tn(count, columns, g + k * outputs + o0, outputs, own.b, columns, own.c, columns,
                static_cast<int>(now), k > 0);
      }
      for (int o = 0; o < count; ++o) {
        const int64_t at = (o0 + o) * stride + static_cast<int64_t>(c0) * taps;
        const float* from = own.c + static_cast<int64_t>(o) * columns;
        if (args.out_dtype == DType::kFloat32) {
          put_run(static_cast<float*>(args.out) + at, from, static_cast<int64_t>(n) * taps, streaming);
        } else {
          put_run(static_cast<bf16*>(args.out) + at, from, static_cast<int64_t>(n) * taps, false);
        }
      }
      if (streaming) finish_streams();
    });
  }
};

// --- few channels --------------------------------------------------------------------------------

// T: elements of the products, values of a pixel or pairs of values of two neighbouring output pixels.
template <class T>
struct Rows {
  static constexpr int kMostColumns = 64 * kValues<T>, kMostLines = 8;  // pixels of a block
  static constexpr int kMostRows = 48;                                  // output channels of a task
  static constexpr int kMostParts = 8;

  const WeightGradientArgs& args;
  const ConvArgs grad = as_input(args);
  const int channels = total_channels(args.conv), outputs = args.conv.out_channels;
  const int stride = args.conv.stride;
  const int run_columns = args.conv.kernel_w * channels;  // one line of the kernel
  const int64_t ldc = round_up(run_columns, 16);
  const int block_columns = min2(kMostColumns, args.conv.out_width);
  const int window_columns = (block_columns - 1) * stride + args.conv.kernel_w;
  const int block_lines = lines();
  const int window_lines = (block_lines - 1) * stride + args.conv.kernel_h;
  const int64_t across = ceil_div(args.conv.out_width, block_columns);
  const int64_t down = ceil_div(args.conv.out_height, block_lines);
  const int64_t blocks = args.conv.images * across * down;
  const int rows = static_cast<int>(ceil_div(outputs, ceil_div(outputs, kMostRows)));
  const int64_t row_blocks = ceil_div(outputs, rows);
  const int64_t sums = args.conv.kernel_h * rows * ldc;
  const int64_t parts = min2<int64_t>(kMostParts, blocks);

  int lines() const {
    const int64_t line = static_cast<int64_t>(window_columns) * channels;
    const int64_t most = (40960 / line - args.conv.kernel_h) / stride + 1;
    return static_cast<int>(
        max2<int64_t>(1, min2<int64_t>(min2<int64_t>(most, kMostLines), args.conv.out_height)));
  }

  struct Own {
    float *window, *g, *alone;
  };
  Own carve_own(Carver& carver) const {
    return {carver.floats(static_cast<int64_t>(window_lines) * window_columns * channels + 2 * kGatherSlack),
            carver.floats(static_cast<int64_t>(block_lines) * block_columns * rows + kGatherSlack),
            carver.floats(kValues<T> == 2 ? window_lines * ldc + kGatherSlack : 0)};
  }
  float* carve_shared(Carver& carver) const { return carver.floats(parts * row_blocks * sums); }
  int64_t workspace(int threads) const {
    Carver shared{nullptr}, own{nullptr};
    carve_shared(shared);
    carve_own(own);
    return shared.used + own.used * threads;
  }

  // to[i] = (first[i], second[i]), values that bfloat16 has; in place where `to` is not past `first`.
  static void pair_up(const float* first, const float* second, int64_t n, float* to) {
    constexpr uint32_t kHigh = 0xffff0000u;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(to + i, (Vec)((VecW)load(first + i) >> 16 | ((VecW)load(second + i) & kHigh)));
    for (; i < n; ++i) {
      uint32_t low, high;
      std::memcpy(&low, first + i, 4);
      std::memcpy(&high, second + i, 4);
      low = low >> 16 | (high & kHigh);
      std::memcpy(to + i, &low, 4);
    }
  }
  // Every column of a window with the one that the next output pixel sees in its place.
  void pair_window(float* window, int64_t lines, int64_t columns, int64_t line) const {
    const int64_t next = static_cast<int64_t>(stride) * channels;
    const int64_t n = max2<int64_t>(0, columns * channels - next);
    for (int64_t y = 0; y < lines; ++y, window += line) {
      pair_up(window, window + next, n, window);
      for (int64_t i = n; i < columns * channels; ++i) pair_up(window + i, &kZero, 1, window + i);
    }
  }
  // What an odd last pixel sees, beside zeros: a gradient of zero would not do, zero times a NaN is none.
  void pair_alone(const float* window, int64_t lines, int64_t line, float* alone) const {
    for (int64_t y = 0; y < lines; ++y, window += line, alone += ldc) {
      for (int i = 0; i < run_columns; i += kLanes) store(alone + i, (Vec)((VecW)load(window + i) & 0xffffu));
    }
  }
  void pair_gradient(float* g, int64_t lines, int64_t columns, int64_t count) const {
    float* to = g;
    for (int64_t y = 0; y < lines; ++y) {
      for (int64_t x = 0; x < columns; x += 2, to += count) {
        const float* const from = g + (y * columns + x) * count;
        if (x + 1 < columns) {
          pair_up(from, from + count, count, to);
        } else {
          for (int64_t i = 0; i < count; ++i) pair_up(from + i, &kZero, 1, to + i);
        }
      }
    }
  }
  static constexpr float kZero = 0.0f;

  void run() const {
    const ConvArgs& a = args.conv;
    Carver carver{static_cast<char*>(args.workspace)};
    float* const partial = carve_shared(carver);
    Carver measure{nullptr};
    carve_own(measure);
    const int64_t share = measure.used, line = static_cast<int64_t>(window_columns) * channels;
    parallel_for(parts * row_blocks, [&](int64_t task, int worker) {
      Carver mine{static_cast<char*>(args.workspace) + carver.used + worker * share};
      const Own own = carve_own(mine);
      const int64_t part = task / row_blocks;
      const int o0 = static_cast<int>(task % row_blocks) * rows, count = min2(rows, outputs - o0);
      float* const c = partial + task * sums;
      const int64_t end = (part + 1) * blocks / parts;
      bool more = false;
      for (int64_t b = part * blocks / parts; b < end; ++b) {
        const int64_t image = b / (across * down), at = b % (across * down);
        const int y0 = static_cast<int>(at / across) * block_lines, ny = min2(block_lines, a.out_height - y0);
        const int x0 = static_cast<int>(at % across) * block_columns;
        const int nx = min2(block_columns, a.out_width - x0);
        gather(a, image, static_cast<int64_t>(y0) * stride - a.pad_top, (ny - 1) * stride + a.kernel_h,
               static_cast<int64_t>(x0) * stride - a.pad_left, (nx - 1) * stride + a.kernel_w, 0, channels,
               own.window, channels, line);
        gather(grad, image, y0, ny, x0, nx, o0, count, own.g, count, static_cast<int64_t>(nx) * count);
        const int64_t pixels = kValues<T>, step = pixels * stride * channels;
        const int whole = static_cast<int>(nx / pixels), elements = static_cast<int>(ceil_div(nx, pixels));
        if constexpr (kValues<T> == 2) {
          const int64_t seen = (ny - 1) * stride + a.kernel_h;
          pair_window(own.window, seen, (nx - 1) * stride + a.kernel_w, line);
          pair_gradient(own.g, ny, nx, count);
          if (elements > whole) pair_alone(own.window + whole * step, seen, line, own.alone);
        }
        for (int ky = 0; ky < a.kernel_h; ++ky) {
          float* const sum = c + ky * rows * ldc;
          for (int y = 0; y < ny; ++y) {
            const T* const g = reinterpret_cast<const T*>(own.g) + static_cast<int64_t>(y) * elements * count;
            const int64_t at = y * stride + ky;
            gemm_tn(count, run_columns, g, count, reinterpret_cast<const T*>(own.window) + at * line, step,
                    sum, ldc, whole, more || y > 0);
            if (elements > whole)
              gemm_tn(count, run_columns, g + static_cast<int64_t>(whole) * count, count,
                      reinterpret_cast<const T*>(own.alone) + at * ldc, ldc, sum, ldc, 1,
                      more || y > 0 || whole > 0);
          }
        }
        more = true;
      }
    });
    auto finish = args.out_dtype == DType::kFloat32 ? &Rows::template add<float> : &Rows::template add<bf16>;
    parallel_for(outputs, [&](int64_t o, int) { (this->*finish)(partial, static_cast<int>(o)); });
  }

  // Adds up the parts of one output channel, and exchanges taps and channels.
  template <class Out>
  void add(const float* partial, int o) const {
    const int kernel_h = args.conv.kernel_h, kernel_w = args.conv.kernel_w;
    Out* const out = static_cast<Out*>(args.out) + static_cast<int64_t>(o) * channels * kernel_h * kernel_w;
    for (int ky = 0; ky < kernel_h; ++ky) {
      const float* from = partial + o / rows * sums + (ky * rows + o % rows) * ldc;
      for (int kx = 0; kx < kernel_w; ++kx) {
        for (int c = 0; c < channels; ++c) {
          float sum = 0;
          for (int64_t p = 0; p < parts; ++p) sum += from[p * row_blocks * sums + kx * channels + c];
          put(out + (static_cast<int64_t>(c) * kernel_h + ky) * kernel_w + kx, sum);
        }
      }
    }
  }
};

const char* never_refuses(const WeightGradientArgs&) { return nullptr; }
const char* pairs_refuse(const WeightGradientArgs& args) {
  const Source& s = args.conv.source[0];
  const bool plain = args.conv.sources == 1 && s.scale == nullptr && s.act == Act::kNone;
  if (!plain || s.dtype != DType::kBFloat16 || args.grad.dtype != DType::kBFloat16)
    return "needs a plain input and a gradient in bfloat16";
  return nullptr;
}

template <class K>
int64_t workspace_of(const WeightGradientArgs& args, int threads) {
  return K{args}.workspace(threads);
}
template <class K>
void run_of(const WeightGradientArgs& args) {
  K{args}.run();
}

}  // namespace

const WeightGradientKernel minimal_gradient = {
    minimal_refuses,
    [](const WeightGradientArgs& args, int threads) {
      return with_forward_scheme(args.conv,
                                 [&]<class S>() { return MinimalGradient<S>{args}.workspace(threads); });
    },
    [](const WeightGradientArgs& args) {
      with_forward_scheme(args.conv, [&]<class S>() { MinimalGradient<S>{args}.run(); });
    }};
const WeightGradientKernel taps_gradient = {never_refuses, workspace_of<Taps>, run_of<Taps>};
const WeightGradientKernel rows_gradient = {never_refuses, workspace_of<Rows<float>>, run_of<Rows<float>>};
const WeightGradientKernel pairs_gradient = {pairs_refuse, workspace_of<Rows<Pair>>, run_of<Rows<Pair>>};

}  // namespace p2pfast::P2PFAST_LEVEL
