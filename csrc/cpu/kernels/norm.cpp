#include "cpu/norm.h"

#include "cpu/epilogue.h"
#include "cpu/gather.h"
#include "cpu/merged.h"
#include "cpu/parallel.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

// A run of pixels of one image row, as (pixel, channel) floats on the stack of the task.
constexpr int kStrip = 2048;  // floats, 8 KB: stays in L1 beside its inputs
constexpr int kChannelChunk = 64;

// Reads channels [c0, c0 + n) of pixels [x0, x0 + pixels) with normalisation and activation.
inline void read_strip(const Source& s, int64_t image, int y, int x0, int pixels, int c0, int n,
                       float* strip) {
  ConvArgs one{};
  one.source[0] = s;
  one.sources = 1;
  one.height = y + 1;
  one.width = x0 + pixels;
  one.pad = Pad::kZero;
  gather(one, image, y, 1, x0, pixels, c0, n, strip, n, 0);
}

template <class T>
void write_strip(const Output& out, int channels, int64_t image, int y, int x0, int pixels, int c0, int n,
                 const float* strip) {
  T* base = static_cast<T*>(out.data) + image * out.image_stride + y * out.row_stride +
            x0 * out.pixel_stride + c0 * out.channel_stride;
  if (out.channel_stride != 1) {
    for (int c = 0; c < n; ++c)
      for (int x = 0; x < pixels; ++x)
        put(base + c * out.channel_stride + x * out.pixel_stride, strip[x * n + c]);
    return;
  }
  const bool last = c0 + n == channels;
  const int room = last ? static_cast<int>(min2<int64_t>(out.pixel_stride - c0, round_up(n, kLanes))) : n;
  for (int x = 0; x < pixels; ++x) {
    int c = 0;
    for (; c + kLanes <= room; c += kLanes) store(base + x * out.pixel_stride + c, load(strip + x * n + c));
    for (; c < n; ++c) put(base + x * out.pixel_stride + c, strip[x * n + c]);
  }
}

void write_any_strip(const Output& out, int channels, int64_t image, int y, int x0, int pixels, int c0, int n,
                     const float* strip) {
  if (out.dtype == DType::kFloat32) {
    write_strip<float>(out, channels, image, y, x0, pixels, c0, n, strip);
  } else {
    write_strip<bf16>(out, channels, image, y, x0, pixels, c0, n, strip);
  }
}

// Calls f(image, y, x0, pixels) for strips of every row, rows in parallel.
template <class F>
void for_strips(int images, int height, int width, int channels, F&& f) {
  const int pixels = max2(1, kStrip / min2(channels, kChannelChunk));
  parallel_for(static_cast<int64_t>(images) * height, [&](int64_t task, int) {
    const int64_t image = task / height;
    const int y = static_cast<int>(task % height);
    for (int x0 = 0; x0 < width; x0 += pixels) f(image, y, x0, min2(pixels, width - x0));
  });
}

void apply(const ApplyArgs& args) {
  for_strips(args.images, args.height, args.width, args.channels,
             [&](int64_t image, int y, int x0, int pixels) {
               alignas(64) float a[kStrip + 2 * kGatherSlack], b[kStrip + 2 * kGatherSlack];
               for (int c0 = 0; c0 < args.channels; c0 += kChannelChunk) {
                 const int n = min2(kChannelChunk, args.channels - c0);
                 const int size = pixels * n;
                 read_strip(args.first, image, y, x0, pixels, c0, n, a);
                 if (args.noise) {
                   const int64_t plane = static_cast<int64_t>(args.height) * args.width;
                   for (int c = 0; c < n; ++c) {
                     const float* noise = args.noise + (image * args.channels + c0 + c) * plane +
                                          static_cast<int64_t>(y) * args.width + x0;
                     for (int x = 0; x < pixels; ++x) a[x * n + c] *= noise[x];
                   }
                 }
                 if (args.second.data) {
                   read_strip(args.second, image, y, x0, pixels, c0, n, b);
                   for (int i = 0; i < size; i += kLanes) store(a + i, load(a + i) + load(b + i));
                 }
                 if (args.act != Act::kNone)
                   for (int i = 0; i < size; i += kLanes)
                     store(a + i, finish(load(a + i), args.act, args.slope));
                 write_any_strip(args.out, args.channels, image, y, x0, pixels, c0, n, a);
               }
             });
}

constexpr int kBand = 16;  // rows of one part

int64_t partials(const StatisticsArgs& args) { return ceil_div(args.height, kBand); }

void statistics(const StatisticsArgs& args) {
  const int64_t parts = partials(args), chunks = ceil_div(args.channels, kChannelChunk);
  const int64_t stride = round_up(args.channels, 16);
  const int strip = kStrip / kChannelChunk;
  parallel_for(args.images * parts * chunks, [&](int64_t task, int) {
    const int c0 = static_cast<int>(task % chunks) * kChannelChunk;
    const int64_t part = task / chunks % parts, image = task / chunks / parts;
    const int n = min2(kChannelChunk, args.channels - c0);
    const int wide = static_cast<int>(round_up(n, kLanes));
    const int y0 = static_cast<int>(part) * kBand, y1 = min2(args.height, y0 + kBand);
    Moments moments[kChannelChunk / kLanes];
    alignas(64) float a[kStrip + 2 * kGatherSlack] = {};
    for (int y = y0; y < y1; ++y) {
      for (int x0 = 0; x0 < args.width; x0 += strip) {
        const int pixels = min2(strip, args.width - x0);
        read_strip(args.source, image, y, x0, pixels, c0, n, a);
        for (int x = 0; x < pixels; ++x)
          for (int v = 0; v * kLanes < wide; ++v) moments[v].add(load(a + x * n + v * kLanes));
        for (int v = 0; v * kLanes < wide; ++v) moments[v].settle();
      }
    }
    float* mean = args.partial + (image * parts + part) * 2 * stride + c0;
    for (int v = 0; v * kLanes < wide; ++v) moments[v].write(mean + v * kLanes, mean + stride + v * kLanes);
    if (c0 == 0) args.count[image * parts + part] = static_cast<float>(moments[0].count);
  });
}

void merge(const MergeArgs& args) {
  const int64_t stride = round_up(args.channels, 16);
  parallel_for(stride / 16, [&](int64_t task, int) {
    for (int64_t c = task * 16; c < task * 16 + 16; ++c) {
      const bool real = c < args.channels;
      Merged batch;
      for (int64_t image = 0; image < args.images; ++image) {
        Merged own;
        Merged& into = args.over_batch ? batch : own;
        for (int64_t p = 0; real && p < args.parts; ++p) {
          const float* mean = args.partial + (image * args.parts + p) * 2 * stride;
          into.add(args.count[image * args.parts + p], mean[c], mean[stride + c]);
        }
        if (args.over_batch && image + 1 < args.images) continue;
        const double variance = real ? into.m2 / into.count : 0.0;
        const double weight = real && args.weight ? args.weight[c] : 1.0,
                     bias = real && args.bias ? args.bias[c] : 0.0;
        const double scale = real ? weight / __builtin_sqrt(variance + args.eps) : 0.0;
        const double shift = real ? bias - into.mean * scale : 0.0;
        for (int64_t i = args.over_batch ? 0 : image; i <= image; ++i) {
          args.scale[i * stride + c] = static_cast<float>(scale);
          args.shift[i * stride + c] = static_cast<float>(shift);
          if (args.mean) args.mean[i * stride + c] = static_cast<float>(into.mean);
          if (args.variance) args.variance[i * stride + c] = static_cast<float>(variance);
        }
      }
    }
  });
}

void avg_pool(const PoolArgs& args) {
  const int chunk = kChannelChunk;
  parallel_for(static_cast<int64_t>(args.images) * args.out_height, [&](int64_t task, int) {
    const int64_t image = task / args.out_height;
    const int oy = static_cast<int>(task % args.out_height);
    const int y0 = oy * args.stride - args.pad_top, y1 = min2(y0 + args.kernel, args.height + args.pad);
    const int ya = max2(y0, 0), yb = min2(y1, args.height);
    alignas(64) float sum[kChannelChunk + kGatherSlack], one[kChannelChunk + 2 * kGatherSlack] = {};
    for (int ox = 0; ox < args.out_width; ++ox) {
      const int x0 = ox * args.stride - args.pad, x1 = min2(x0 + args.kernel, args.width + args.pad);
      const int xa = max2(x0, 0), xb = min2(x1, args.width);
      const int divisor = args.count_include_pad ? (y1 - y0) * (x1 - x0) : (yb - ya) * (xb - xa);
      for (int c0 = 0; c0 < args.channels; c0 += chunk) {
        const int n = min2(chunk, args.channels - c0), wide = static_cast<int>(round_up(n, kLanes));
        for (int c = 0; c < wide; c += kLanes) store(sum + c, Vec{});
        for (int y = ya; y < yb; ++y) {
          for (int x = xa; x < xb; ++x) {
            read_strip(args.source, image, y, x, 1, c0, n, one);
            for (int c = 0; c < wide; c += kLanes) store(sum + c, load(sum + c) + load(one + c));
          }
        }
        for (int c = 0; c < wide; c += kLanes) store(sum + c, load(sum + c) / static_cast<float>(divisor));
        write_any_strip(args.out, args.channels, image, oy, ox, 1, c0, n, sum);
      }
    }
  });
}

}  // namespace

const NormKernels norm_kernels = {partials, statistics, merge, apply, avg_pool};

}  // namespace p2pfast::P2PFAST_LEVEL
