// The passes of norm_act over NHWC tensors. Work is cut into bands of pixels and slabs of channels; what few
// channels at a time leave of a map in a core's cache is one task, from its sums to its last value.
#pragma once

#include "cpu/norm_act_values.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int kSlab = 128;                    // channels of a task, at most
inline constexpr int kLeastSlab = 32;                // a cache line of bfloat16 values
inline constexpr int64_t kSlabBytes = 256 << 10;     // that stay in a core's cache
inline constexpr int kGroup = kLanes == 16 ? 4 : 2;  // vectors whose numbers stay in registers
inline constexpr int64_t kShiftPixels = 8;           // whose mean is what variances are taken around

// Part of a tensor: pixels [first, first + pixels) of all images one after the other, channels [c, ...).
struct Piece {
  int64_t first, pixels, channel;
  int count;  // of channels in all
};

// kVectors vectors of channels of each pixel; the last holds `some` values where kSome.
template <int kVectors, bool kSome>
struct Lanes {
  int some;
  template <class T>
  P2PFAST_INLINE Vec read(const T* p, int v) const {
    if constexpr (kSome) return load_some(p, some);
    return load(p + v * kLanes);
  }
  template <class T>
  P2PFAST_INLINE void write(T* p, int v, Vec value) const {
    if constexpr (kSome) {
      store_some(p, value, some);
    } else {
      store(p + v * kLanes, value);
    }
  }
  P2PFAST_INLINE void read_all(const float* p, Vec (&to)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) to[v] = read(p, v);
  }
};

// Calls f.template operator()<kVectors, kSome>(lanes, c) for the channels [c, end) from c on.
template <int kVectors = kGroup, class F>
P2PFAST_INLINE void for_lanes(int64_t c, int64_t end, F&& f) {
  for (; c + kVectors * kLanes <= end; c += kVectors * kLanes)
    f.template operator()<kVectors, false>(Lanes<kVectors, false>{kLanes}, c);
  if constexpr (kVectors > 1) {
    for_lanes<kVectors / 2>(c, end, f);
  } else if (c < end) {
    f.template operator()<1, true>(Lanes<1, true>{static_cast<int>(end - c)}, c);
  }
}

// What normalises kVectors vectors of channels.
template <int kVectors>
struct Numbers {
  Vec mean[kVectors], rstd[kVectors], weight[kVectors], bias[kVectors];

  template <bool kSome>
  P2PFAST_INLINE Numbers(const NormActArgs& a, const Lanes<kVectors, kSome>& lanes, int64_t image,
                         int64_t c) {
    const int64_t at = (a.over_batch ? 0 : image * a.channels) + c;
    lanes.read_all(a.mean + at, mean);
    lanes.read_all(norm_act_rstd(a) + at, rstd);
    for (int v = 0; v < kVectors; ++v) weight[v] = splat(1.0f), bias[v] = Vec{};
    if (a.weight) lanes.read_all(a.weight + c, weight);
    if (a.bias) lanes.read_all(a.bias + c, bias);
  }
  P2PFAST_INLINE Normalized operator()(Vec x, int v) const {
    const Vec n = (x - mean[v]) * rstd[v];
    return {n, n * weight[v] + bias[v]};
  }
};

// Mean and sum of squared differences of every channel of a piece.
template <class T>
void piece_moments(const NormActArgs& a, const Piece& piece, float* mean, float* m2) {
  for_lanes(0, piece.count, [&]<int kVectors, bool kSome>(Lanes<kVectors, kSome> lanes, int64_t c) {
    const T* const x = static_cast<const T*>(a.x) + piece.first * a.channels + piece.channel + c;
    Vec shift[kVectors] = {}, sum[kVectors] = {}, squares[kVectors] = {};
    const int64_t few = min2(kShiftPixels, piece.pixels);
    for (int64_t p = 0; p < few; ++p)
      for (int v = 0; v < kVectors; ++v) shift[v] += lanes.read(x + p * a.channels, v);
    for (int v = 0; v < kVectors; ++v) shift[v] /= static_cast<float>(few);
    for (int64_t p = 0; p < piece.pixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec d = lanes.read(x + p * a.channels, v) - shift[v];
        sum[v] += d;
        squares[v] += d * d;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Vec average = sum[v] / static_cast<float>(piece.pixels), spread = squares[v] - sum[v] * average;
      lanes.write(mean + c, v, shift[v] + average);
      lanes.write(m2 + c, v, spread < 0.0f ? Vec{} : spread);
    }
  });
}

template <class T, Act kAct>
void apply_piece(const NormActArgs& a, const Piece& piece, int64_t image) {
  const Vec slope = splat(a.slope);
  for_lanes(0, piece.count, [&]<int kVectors, bool kSome>(Lanes<kVectors, kSome> lanes, int64_t c) {
    const int64_t first = piece.first * a.channels + piece.channel + c;
    const Numbers<kVectors> normalize(a, lanes, image, piece.channel + c);
    auto run = [&]<bool kResidual>() {
      const T* x = static_cast<const T*>(a.x) + first;
      const T* residual = kResidual ? static_cast<const T*>(a.residual) + first : nullptr;
      T* out = static_cast<T*>(a.out) + first;
      for (int64_t p = 0; p < piece.pixels; ++p, x += a.channels, out += a.channels) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Vec z = normalize(lanes.read(x, v), v).z;
          if constexpr (kResidual) z += lanes.read(residual, v);
          lanes.write(out, v, apply_act<kAct>(z, slope));
        }
        if constexpr (kResidual) residual += a.channels;
      }
    };
    a.residual ? run.template operator()<true>() : run.template operator()<false>();
  });
}

// dz of one vector: what the incoming gradient is before the activation.
template <Act kAct, bool kResidual, int kVectors, bool kSome, class T>
P2PFAST_INLINE Normalized gradient(const Numbers<kVectors>& normalize, Lanes<kVectors, kSome> lanes, int v,
                                   const T* x, const T* dy, const T* residual, Vec slope) {
  Normalized n = normalize(lanes.read(x, v), v);
  if constexpr (kResidual) n.z += lanes.read(residual, v);
  n.z = before_act<kAct>(lanes.read(dy, v), n.z, slope);
  return n;
}

// The sums of dz and dz * (x - mean) * rstd of every channel of a piece.
template <class T, Act kAct>
void piece_sums(const NormActArgs& a, const Piece& piece, int64_t image, float* sum, float* product) {
  const Vec slope = splat(a.slope);
  for_lanes(0, piece.count, [&]<int kVectors, bool kSome>(Lanes<kVectors, kSome> lanes, int64_t c) {
    const int64_t first = piece.first * a.channels + piece.channel + c;
    const Numbers<kVectors> normalize(a, lanes, image, piece.channel + c);
    Vec sums[kVectors] = {}, products[kVectors] = {};
    auto run = [&]<bool kResidual>() {
      const T *x = static_cast<const T*>(a.x) + first, *dy = static_cast<const T*>(a.dy) + first;
      const T* residual = kResidual ? static_cast<const T*>(a.residual) + first : nullptr;
      for (int64_t p = 0; p < piece.pixels; ++p, x += a.channels, dy += a.channels) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Normalized n = gradient<kAct, kResidual>(normalize, lanes, v, x, dy, residual, slope);
          sums[v] += n.z;
          products[v] += n.z * n.x;
        }
        if constexpr (kResidual) residual += a.channels;
      }
    };
    a.residual ? run.template operator()<true>() : run.template operator()<false>();
    for (int v = 0; v < kVectors; ++v) {
      lanes.write(sum + c, v, sums[v]);
      lanes.write(product + c, v, products[v]);
    }
  });
}

template <class T, Act kAct>
void backward_piece(const NormActArgs& a, const Piece& piece, int64_t image, float share) {
  const Vec slope = splat(a.slope);
  const bool frozen = a.frozen;  // zero times a sum or a value that is not finite would not be zero
  for_lanes(0, piece.count, [&]<int kVectors, bool kSome>(Lanes<kVectors, kSome> lanes, int64_t c) {
    const int64_t first = piece.first * a.channels + piece.channel + c;
    const int64_t at = (a.over_batch ? 0 : image * a.channels) + piece.channel + c;
    const Numbers<kVectors> normalize(a, lanes, image, piece.channel + c);
    Vec mean_dz[kVectors], mean_product[kVectors];
    lanes.read_all(norm_act_sums(a) + at, mean_dz);
    lanes.read_all(norm_act_products(a) + at, mean_product);
    for (int v = 0; v < kVectors; ++v) mean_dz[v] *= share, mean_product[v] *= share;
    auto run = [&]<bool kResidual>() {
      const T *x = static_cast<const T*>(a.x) + first, *dy = static_cast<const T*>(a.dy) + first;
      const T* residual = kResidual ? static_cast<const T*>(a.residual) + first : nullptr;
      T* dx = static_cast<T*>(a.out) + first;
      T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + first : nullptr;
      for (int64_t p = 0; p < piece.pixels; ++p, x += a.channels, dy += a.channels, dx += a.channels) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Normalized n = gradient<kAct, kResidual>(normalize, lanes, v, x, dy, residual, slope);
          const Vec centered = frozen ? n.z : n.z - mean_dz[v] - n.x * mean_product[v];
          lanes.write(dx, v, normalize.rstd[v] * normalize.weight[v] * centered);
          if (dresidual) lanes.write(dresidual, v, n.z);
        }
        if constexpr (kResidual) residual += a.channels;
        if (dresidual) dresidual += a.channels;
      }
    };
    a.residual ? run.template operator()<true>() : run.template operator()<false>();
  });
}

// Calls f(image, band, piece) for every band of one image's pixels.
template <class F>
void for_bands_of(const NormActArgs& a, int64_t image, int64_t channel, int count, F&& f) {
  for (int64_t p = 0; p < a.pixels; p += kNormBand)
    f(image, p / kNormBand, Piece{image * a.pixels + p, min2(kNormBand, a.pixels - p), channel, count});
}

// The channels of a task that holds all pixels of them in a core's cache, `tensors` values each; 0: too many
// pixels, or too few tasks for the threads.
inline int slab(const NormActArgs& a, int tensors) {
  const int64_t groups = a.over_batch ? 1 : a.images, pixels = a.over_batch ? a.images * a.pixels : a.pixels;
  const int64_t bytes = pixels * tensors * (a.dtype == DType::kFloat32 ? 4 : 2);
  const auto tasks = [&](int width) { return groups * ceil_div(a.channels, width); };
  if (bytes * min2<int64_t>(kLeastSlab, a.channels) > kSlabBytes) return 0;
  int width = kSlab;
  while (width > kLeastSlab && (bytes * width > kSlabBytes || tasks(width) < 2 * num_threads())) width /= 2;
  return tasks(width) < num_threads() && bytes * a.channels > kSlabBytes / 4 ? 0 : width;
}

// Calls f(first image, end image, channel, count) for every slab, in parallel.
template <class F>
void for_slabs(const NormActArgs& a, int width, F&& f) {
  const int64_t slabs = ceil_div(a.channels, width);
  parallel_for((a.over_batch ? 1 : a.images) * slabs, [&](int64_t task, int) {
    const int64_t image = task / slabs, channel = task % slabs * width;
    f(image, a.over_batch ? a.images : image + 1, channel,
      static_cast<int>(min2<int64_t>(width, a.channels - channel)));
  });
}

// Calls f(image, band, piece) for every band of every image and kSlab channels, in parallel.
template <class F>
void for_bands(const NormActArgs& a, F&& f) {
  const int64_t bands = ceil_div(a.pixels, kNormBand), slabs = ceil_div(a.channels, kSlab);
  parallel_for(a.images * bands * slabs, [&](int64_t task, int) {
    const int64_t image = task / slabs / bands, band = task / slabs % bands, channel = task % slabs * kSlab;
    const int64_t p = band * kNormBand;
    f(image, band,
      Piece{image * a.pixels + p, min2(kNormBand, a.pixels - p), channel,
            static_cast<int>(min2<int64_t>(kSlab, a.channels - channel))});
  });
}

// Calls f(c, first part, parts) for every mean, in parallel; its parts follow each other in the partial sums.
template <class F>
void for_means(const NormActArgs& a, F&& f) {
  const int64_t bands = ceil_div(a.pixels, kNormBand), groups = ceil_div(a.channels, 16);
  parallel_for((a.over_batch ? 1 : a.images) * groups, [&](int64_t task, int) {
    const int64_t image = task / groups, end = min2(a.channels, task % groups * 16 + 16);
    for (int64_t c = task % groups * 16; c < end; ++c)
      f(image * a.channels + c, norm_act_partials(a) + image * bands * 2 * a.channels + c,
        a.over_batch ? a.images * bands : bands);
  });
}

inline int64_t band_pixels(const NormActArgs& a, int64_t part) {
  const int64_t bands = ceil_div(a.pixels, kNormBand);
  return min2(kNormBand, a.pixels - part % bands * kNormBand);
}

template <class T, Act kAct>
void forward_bands(const NormActArgs& a) {
  const int64_t bands = ceil_div(a.pixels, kNormBand);
  if (a.frozen) {
    for_bands(a, [&](int64_t image, int64_t, const Piece& piece) { apply_piece<T, kAct>(a, piece, image); });
    return;
  }
  if (const int width = slab(a, 1)) {
    for_slabs(a, width, [&](int64_t first, int64_t end, int64_t channel, int count) {
      alignas(64) float mean[kSlab], m2[kSlab];
      Merged merged[kSlab];
      for (int64_t image = first; image < end; ++image) {
        for_bands_of(a, image, channel, count, [&](int64_t, int64_t, const Piece& piece) {
          piece_moments<T>(a, piece, mean, m2);
          for (int c = 0; c < count; ++c) merged[c].add(static_cast<double>(piece.pixels), mean[c], m2[c]);
        });
      }
      const int64_t at = (a.over_batch ? 0 : first * a.channels) + channel;
      for (int c = 0; c < count; ++c) put_statistics(a, at + c, merged[c]);
      for (int64_t image = first; image < end; ++image)
        apply_piece<T, kAct>(a, {image * a.pixels, a.pixels, channel, count}, image);
    });
    return;
  }
  for_bands(a, [&](int64_t image, int64_t band, const Piece& piece) {
    float* const to = norm_act_partials(a) + (image * bands + band) * 2 * a.channels + piece.channel;
    piece_moments<T>(a, piece, to, to + a.channels);
  });
  for_means(a, [&](int64_t at, const float* from, int64_t parts) {
    Merged merged;
    for (int64_t p = 0; p < parts; ++p, from += 2 * a.channels)
      merged.add(static_cast<double>(band_pixels(a, p)), from[0], from[a.channels]);
    put_statistics(a, at, merged);
  });
  for_bands(a, [&](int64_t image, int64_t, const Piece& piece) { apply_piece<T, kAct>(a, piece, image); });
}

template <class T, Act kAct>
void backward_bands(const NormActArgs& a) {
  const int64_t bands = ceil_div(a.pixels, kNormBand);
  float *const sums = norm_act_sums(a), *const products = norm_act_products(a);
  const double values = static_cast<double>(a.pixels) * static_cast<double>(a.over_batch ? a.images : 1);
  const auto share = static_cast<float>(1.0 / values);
  if (const int width = slab(a, a.residual ? 3 : 2)) {
    for_slabs(a, width, [&](int64_t first, int64_t end, int64_t channel, int count) {
      alignas(64) float sum[kSlab], product[kSlab];
      double all[kSlab] = {}, all_products[kSlab] = {};
      for (int64_t image = first; image < end; ++image) {
        for_bands_of(a, image, channel, count, [&](int64_t, int64_t, const Piece& piece) {
          piece_sums<T, kAct>(a, piece, image, sum, product);
          for (int c = 0; c < count; ++c) all[c] += sum[c], all_products[c] += product[c];
        });
      }
      const int64_t at = (a.over_batch ? 0 : first * a.channels) + channel;
      for (int c = 0; c < count; ++c) {
        sums[at + c] = static_cast<float>(all[c]);
        products[at + c] = static_cast<float>(all_products[c]);
      }
      for (int64_t image = first; image < end; ++image)
        backward_piece<T, kAct>(a, {image * a.pixels, a.pixels, channel, count}, image, share);
    });
    return;
  }
  for_bands(a, [&](int64_t image, int64_t band, const Piece& piece) {
    float* const to = norm_act_partials(a) + (image * bands + band) * 2 * a.channels + piece.channel;
    piece_sums<T, kAct>(a, piece, image, to, to + a.channels);
  });
  for_means(a, [&](int64_t at, const float* from, int64_t parts) {
    double sum = 0, product = 0;
    for (int64_t p = 0; p < parts; ++p, from += 2 * a.channels) {
      sum += from[0];
      product += from[a.channels];
    }
    sums[at] = static_cast<float>(sum);
    products[at] = static_cast<float>(product);
  });
  for_bands(a, [&](int64_t image, int64_t, const Piece& piece) {
    backward_piece<T, kAct>(a, piece, image, share);
  });
}

}  // namespace p2pfast::P2PFAST_LEVEL
