// The passes of norm_act over NCHW tensors.
#pragma once

#include "cpu/norm_act_values.h"

namespace p2pfast::P2PFAST_LEVEL {

inline constexpr int64_t kFloatSum = 2048;  // values added up in float32 before float64 takes over

// One channel's numbers in all lanes.
struct OneChannel {
  Vec mean, rstd, weight, bias;
  P2PFAST_INLINE Normalized operator()(Vec x) const {
    const Vec n = (x - mean) * rstd;
    return {n, n * weight + bias};
  }
};

inline OneChannel one_channel(const NormActArgs& a, int64_t image, int64_t channel) {
  const int64_t at = (a.over_batch ? 0 : image * a.channels) + channel;
  return {splat(a.mean[at]), splat(norm_act_rstd(a)[at]), splat(a.weight ? a.weight[channel] : 1.0f),
          splat(a.bias ? a.bias[channel] : 0.0f)};
}

template <class T>
void add_plane(const T* x, int64_t pixels, Merged& merged) {
  int64_t i = 0;
  while (i + 2 * kLanes <= pixels) {
    Moments moments[2];
    const int64_t end = min2(i + kFloatSum, pixels);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      moments[0].add(load(x + i));
      moments[1].add(load(x + i + kLanes));
    }
    float mean[kLanes], m2[kLanes];
    for (int k = 0; k < 2; ++k) {
      moments[k].write(mean, m2);
      for (int lane = 0; lane < kLanes; ++lane)
        merged.add(static_cast<double>(moments[k].count), mean[lane], m2[lane]);
    }
  }
  for (; i < pixels; ++i) merged.add(1, to_float(x[i]), 0);
}

template <class T, Act kAct>
void forward_plane(const NormActArgs& a, int64_t image, int64_t channel) {
  const int64_t first = (image * a.channels + channel) * a.pixels;
  const T* const x = static_cast<const T*>(a.x) + first;
  const T* const residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
  T* const out = static_cast<T*>(a.out) + first;
  const OneChannel normalize = one_channel(a, image, channel);
  const Vec slope = splat(a.slope);
  int64_t i = 0;
  for (; i + kLanes <= a.pixels; i += kLanes) {
    Vec z = normalize(load(x + i)).z;
    if (residual) z += load(residual + i);
    store(out + i, apply_act<kAct>(z, slope));
  }
  if (const int64_t n = a.pixels - i; n > 0) {
    Vec z = normalize(load_some(x + i, n)).z;
    if (residual) z += load_some(residual + i, n);
    store_some(out + i, apply_act<kAct>(z, slope), n);
  }
}

// A task is a channel of an image, or of all images, so that its planes are still in the cache when they
// are read again.
template <class F>
void for_planes(const NormActArgs& a, F&& body) {
  parallel_for(a.over_batch ? a.channels : a.images * a.channels, [&](int64_t task, int) {
    const int64_t first = a.over_batch ? 0 : task / a.channels;
    body(first, a.over_batch ? a.images : first + 1, task % a.channels, task);
  });
}

template <class T, Act kAct>
void forward_planes(const NormActArgs& a) {
  for_planes(a, [&](int64_t first, int64_t end, int64_t channel, int64_t at) {
    if (!a.frozen) {
      Merged merged;
      for (int64_t image = first; image < end; ++image)
        add_plane(static_cast<const T*>(a.x) + (image * a.channels + channel) * a.pixels, a.pixels, merged);
      put_statistics(a, at, merged);
    }
    for (int64_t image = first; image < end; ++image) forward_plane<T, kAct>(a, image, channel);
  });
}

template <class T, Act kAct>
void add_plane_sums(const NormActArgs& a, int64_t image, int64_t channel, double& sum, double& product) {
  const int64_t first = (image * a.channels + channel) * a.pixels;
  const T* const x = static_cast<const T*>(a.x) + first;
  const T* const dy = static_cast<const T*>(a.dy) + first;
  const T* const residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
  const OneChannel normalize = one_channel(a, image, channel);
  const Vec slope = splat(a.slope);
  int64_t i = 0;
  while (i + 2 * kLanes <= a.pixels) {
    Vec sums[2] = {}, products[2] = {};
    const int64_t end = min2(i + kFloatSum, a.pixels);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      for (int k = 0; k < 2; ++k) {
        const int64_t at = i + k * kLanes;
        Normalized n = normalize(load(x + at));
        if (residual) n.z += load(residual + at);
        const Vec dz = before_act<kAct>(load(dy + at), n.z, slope);
        sums[k] += dz;
        products[k] += dz * n.x;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      sum += sums[0][lane] + sums[1][lane];
      product += products[0][lane] + products[1][lane];
    }
  }
  for (; i < a.pixels; i += kLanes) {
    const int64_t n = min2<int64_t>(kLanes, a.pixels - i);
    Normalized v = normalize(load_some(x + i, n));
    if (residual) v.z += load_some(residual + i, n);
    const Vec dz = before_act<kAct>(load_some(dy + i, n), v.z, slope), p = dz * v.x;
    for (int64_t lane = 0; lane < n; ++lane) {
      sum += dz[lane];
      product += p[lane];
    }
  }
}

template <class T, Act kAct>
void backward_plane(const NormActArgs& a, int64_t image, int64_t channel, float mean_dz, float mean_product) {
  const int64_t first = (image * a.channels + channel) * a.pixels;
  const T* const x = static_cast<const T*>(a.x) + first;
  const T* const dy = static_cast<const T*>(a.dy) + first;
  const T* const residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
  T* const dx = static_cast<T*>(a.out) + first;
  T* const dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + first : nullptr;
  const OneChannel normalize = one_channel(a, image, channel);
  const Vec slope = splat(a.slope), m1 = splat(mean_dz), m2 = splat(mean_product);
  const Vec scale = normalize.rstd * normalize.weight;
  const bool frozen = a.frozen;  // zero times a sum or a value that is not finite would not be zero
  int64_t i = 0;
  for (; i + kLanes <= a.pixels; i += kLanes) {
    Normalized n = normalize(load(x + i));
    if (residual) n.z += load(residual + i);
    const Vec dz = before_act<kAct>(load(dy + i), n.z, slope);
    store(dx + i, scale * (frozen ? dz : dz - m1 - n.x * m2));
    if (dresidual) store(dresidual + i, dz);
  }
  if (const int64_t rest = a.pixels - i; rest > 0) {
    Normalized n = normalize(load_some(x + i, rest));
    if (residual) n.z += load_some(residual + i, rest);
    const Vec dz = before_act<kAct>(load_some(dy + i, rest), n.z, slope);
    store_some(dx + i, scale * (frozen ? dz : dz - m1 - n.x * m2), rest);
    if (dresidual) store_some(dresidual + i, dz, rest);
  }
}

template <class T, Act kAct>
void backward_planes(const NormActArgs& a) {
  for_planes(a, [&](int64_t first, int64_t end, int64_t channel, int64_t at) {
    double sum = 0, product = 0;
    for (int64_t image = first; image < end; ++image)
      add_plane_sums<T, kAct>(a, image, channel, sum, product);
    norm_act_sums(a)[at] = static_cast<float>(sum);
    norm_act_products(a)[at] = static_cast<float>(product);
    const double count = 1.0 / static_cast<double>((end - first) * a.pixels);
    for (int64_t image = first; image < end; ++image)
      backward_plane<T, kAct>(a, image, channel, static_cast<float>(sum * count),
                              static_cast<float>(product * count));
  });
}

}  // namespace p2pfast::P2PFAST_LEVEL
