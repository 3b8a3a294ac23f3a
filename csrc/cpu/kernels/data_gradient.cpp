#include "cpu/data_gradient.h"

#include "cpu/epilogue.h"
#include "cpu/gather.h"
#include "cpu/parallel.h"
#include "cpu/toom_adjoint.h"
#include "cpu/winograd.h"
#include "cpu/workspace.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

// A task makes some channels of whole images: what the tiles add to the padded gradient is summed in a
// scratch, where the padding is folded onto the pixels that it was copied from. S is the scheme of the
// convolution itself.
template <class S>
struct DataGradient {
  using W = Winograd<Adjoint<S>>;
  static constexpr int kStep = S::kStepOut, kOverlap = S::kTaps - 1;
  static constexpr int kPassTiles = 256, kMostTiles = 4096;

  const DataGradientArgs& args;
  const ConvArgs& conv = args.conv;
  const int tiles_y = static_cast<int>(ceil_div(conv.out_height, kStep));
  const int tiles_x = static_cast<int>(ceil_div(conv.out_width, kStep));
  const int64_t tiles = static_cast<int64_t>(tiles_y) * tiles_x;
  const int64_t columns = kStep * tiles_x + kOverlap;  // of the scratch
  const int images =                                   // of a pass
      static_cast<int>(max2<int64_t>(1, min2<int64_t>(conv.images, kPassTiles / tiles)));

  // Images [first, first + count) as a convolution of the gradient, by tiles that lie side by side.
  ConvArgs pass(int first, int count) const {
    ConvArgs a{};
    a.source[0] = args.grad;
    const int64_t size = args.grad.dtype == DType::kFloat32 ? 4 : 2;
    a.source[0].data = static_cast<const char*>(args.grad.data) + size * first * args.grad.image_stride;
    a.sources = 1;
    a.images = count;
    a.height = conv.out_height;
    a.width = conv.out_width;
    a.out_height = tiles_y * Adjoint<S>::kStepOut;
    a.out_width = tiles_x * Adjoint<S>::kStepOut;
    a.out_channels = conv.source[0].channels;
    a.kernel_h = a.kernel_w = S::kTaps;
    a.stride = 1;
    a.weight = conv.weight;
    a.weight_dtype = conv.weight_dtype;
    a.weight_out_stride = conv.weight_in_stride;
    a.weight_in_stride = conv.weight_out_stride;
    a.weight_turned = conv.weight_turned;
    a.out = args.out;
    a.block = static_cast<int>(count * tiles);
    return a;
  }

  float* carve_own(Carver& carver) const {
    return carver.floats((kStep * tiles_y + kOverlap) * columns * max2(kPanel, W::kSortedWidth));
  }
  int64_t workspace(int threads) const {
    Carver own{nullptr};
    carve_own(own);
    return own.used * threads + W{pass(0, images)}.template stream_workspace<true>(threads);
  }

  void run() const {
    Carver measure{nullptr};
    carve_own(measure);
    char* const rest = static_cast<char*>(args.workspace) + measure.used * p2pfast::num_threads();
    for (int first = 0; first < conv.images; first += images) {
      ConvArgs a = pass(first, min2(images, conv.images - first));
      a.workspace = rest;
      W{a}.template run_passes<true>(
          [&](int64_t, int64_t, int c, int width, const float* sums, int64_t sums_stride, int worker) {
            Carver carver{static_cast<char*>(args.workspace) + worker * measure.used};
            float* const sum = carve_own(carver);
            for (int n = 0; n < a.images; ++n) {
              add_up(sums + n * tiles * kPanel, sums_stride, width, sum);
              fold(sum, width);
              args.out.dtype == DType::kFloat32 ? store_image<float>(a, first + n, c, width, sum)
                                                : store_image<bf16>(a, first + n, c, width, sum);
            }
          });
    }
  }

  // The padded gradient of an image, sum[row][column][channel], of its tiles' sums. Tiles are added in order,
  // and what none before has reached is not read.
  void add_up(const float* sums, int64_t sums_stride, int width, float* sum) const {
    constexpr int kWindow = S::kWindow;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t ty = t / tiles_x, tx = t % tiles_x;
      float* const window = sum + (ty * columns + tx) * kStep * width;
      for (int c = 0; c < width; c += kLanes) {
        Vec tile[kWindow * kWindow];
        W::tile_values(W::panel_of(sums + t * kPanel, c, sums_stride), sums_stride, tile);
        for (int y = 0; y < kWindow; ++y) {
          float* const row = window + y * columns * width + c;
          const int reached = ty > 0 && y < kOverlap ? kWindow : tx > 0 ? kOverlap : 0;
#pragma GCC unroll 10
          for (int x = 0; x < kWindow; ++x) {
            float* const to = row + x * width;
            const Vec value = tile[y * kWindow + x];
            store(to, x < reached ? load(to) + value : value);
          }
        }
      }
    }
  }

  // Adds the padding to what it was copied from: rows first, then columns, so that corners arrive too.
  void fold(float* sum, int width) const {
    if (conv.pad == Pad::kZero) return;
    const int64_t row = columns * width;
    fold_ends(sum, row, conv.height, conv.pad_top, conv.width + 2 * conv.pad_left, width, width);
    for (int y = 0; y < conv.height; ++y)
      fold_ends(sum + (conv.pad_top + y) * row, width, conv.width, conv.pad_left, 1, width, width);
  }
  // Of `size` + 2 * `pad` lines `stride` apart, of `count` runs of `width` values `step` apart.
  void fold_ends(float* first, int64_t stride, int size, int pad, int count, int64_t step, int width) const {
    for (int i = 0; i < 2 * pad; ++i) {
      const int64_t at = i < pad ? i : size + i, to = pad + padded_index(at - pad, size, conv.pad);
      for (int n = 0; n < count; ++n) {
        for (int c = 0; c < width; c += kLanes) {
          float* const value = first + to * stride + n * step + c;
          store(value, load(value) + load(first + at * stride + n * step + c));
        }
      }
    }
  }

  template <class T>
  void store_image(const ConvArgs& a, int64_t image, int c0, int width, const float* sum) const {
    T* const out = static_cast<T*>(args.out.data) + image * args.out.image_stride;
    for (int y = 0; y < conv.height; ++y) {
      const float* from = sum + ((conv.pad_top + y) * columns + conv.pad_left) * width;
      T* to = out + y * args.out.row_stride;
      for (int x = 0; x < conv.width; ++x, from += width, to += args.out.pixel_stride) {
        for (int c = 0; c < width; c += kLanes) put_vector(a, to, c0 + c, load(from + c));
      }
    }
  }
};

using Three = DataGradient<Stride1<F43, 4, 3>>;

}  // namespace

const DataGradientKernel data_gradient = {
    [](const DataGradientArgs& args) -> const char* {
      const ConvArgs& a = args.conv;
      if (a.transposed || a.stride != 1 || a.kernel_h != 3 || a.kernel_w != 3)
        return "needs 3x3 with stride 1, not transposed";
      if (a.sources != 1) return "needs a single input";
      // Rows of the scratch follow from the output, those that are read from the input.
      if (a.out_height != a.height + 2 * a.pad_top - 2 || a.out_width != a.width + 2 * a.pad_left - 2)
        return "needs all of the output";
      if (Three{args}.tiles > Three::kMostTiles) return "needs fewer pixels";
      return nullptr;
    },
    [](const DataGradientArgs& args, int threads) { return Three{args}.workspace(threads); },
    [](const DataGradientArgs& args) { Three{args}.run(); }};

}  // namespace p2pfast::P2PFAST_LEVEL
