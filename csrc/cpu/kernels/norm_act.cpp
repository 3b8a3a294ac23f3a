#include "cpu/norm_act.h"

#include "cpu/epilogue.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int64_t kFloatSum = 2048;  // values added up in float32 before float64 takes over
constexpr int kChannelChunk = 128;

template <Act kAct>
P2PFAST_INLINE Vec apply_act(Vec z, Vec slope) {
  if constexpr (kAct == Act::kElu) return z > 0.0f || z != z ? z : slope * (exp_vec(z) - 1.0f);
  return finish(z, kAct, slope[0]);
}

// As PyTorch: zero is on the negative side.
template <Act kAct>
P2PFAST_INLINE Vec derivative(Vec z, Vec slope) {
  const Vec one = splat(1.0f);
  if constexpr (kAct == Act::kRelu) return z > 0.0f ? one : Vec{};
  if constexpr (kAct == Act::kLeaky) return z > 0.0f ? one : slope;
  if constexpr (kAct == Act::kTanh) {
    const Vec y = tanh_vec(z);
    return 1.0f - y * y;
  }
  if constexpr (kAct == Act::kSigmoid) {
    const Vec y = sigmoid_vec(z);
    return y * (1.0f - y);
  }
  if constexpr (kAct == Act::kElu) return z > 0.0f ? one : slope * exp_vec(z);
  if constexpr (kAct == Act::kSilu) {
    const Vec y = sigmoid_vec(z);
    return y + z * y * (1.0f - y);
  }
  return one;
}

// The first n values, zeros after them.
template <class T>
P2PFAST_INLINE Vec load_some(const T* p, int64_t n) {
  T values[kLanes] = {};
  std::memcpy(values, p, static_cast<size_t>(n) * sizeof(T));
  return load(values);
}

template <class T>
P2PFAST_INLINE void store_some(T* p, Vec v, int64_t n) {
  T values[kLanes];
  store(values, v);
  std::memcpy(p, values, static_cast<size_t>(n) * sizeof(T));
}

struct Normalized {
  Vec x, z;  // (x - mean) * rstd, and what the activation gets
};

// One channel's numbers in all lanes.
struct OneChannel {
  Vec mean, rstd, weight, bias;
  P2PFAST_INLINE Normalized operator()(Vec x) const {
    const Vec n = (x - mean) * rstd;
    return {n, n * weight + bias};
  }
};

OneChannel one_channel(const NormActArgs& a, int64_t image, int64_t channel) {
  const int64_t at = (a.over_batch ? 0 : image * a.channels) + channel;
  return {splat(a.mean[at]), splat(a.rstd[at]), splat(a.weight ? a.weight[channel] : 1.0f),
          splat(a.bias ? a.bias[channel] : 0.0f)};
}

// Chan's update.
struct Merged {
  double count = 0, mean = 0, m2 = 0;
  void add(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double total = count + n, delta = other_mean - mean;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * n / total);
    count = total;
  }
};

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
void forward(const NormActArgs& a) {
  for_planes(a, [&](int64_t first, int64_t end, int64_t channel, int64_t at) {
    if (!a.frozen) {
      Merged merged;
      for (int64_t image = first; image < end; ++image)
        add_plane(static_cast<const T*>(a.x) + (image * a.channels + channel) * a.pixels, a.pixels, merged);
      const double variance = merged.m2 / merged.count;
      a.mean[at] = static_cast<float>(merged.mean);
      a.rstd[at] = static_cast<float>(1.0 / __builtin_sqrt(variance + a.eps));
      if (a.variance) a.variance[at] = static_cast<float>(variance);
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
        const Vec dz = load(dy + at) * derivative<kAct>(n.z, slope);
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
    const Vec dz = load_some(dy + i, n) * derivative<kAct>(v.z, slope), p = dz * v.x;
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
  int64_t i = 0;
  for (; i + kLanes <= a.pixels; i += kLanes) {
    Normalized n = normalize(load(x + i));
    if (residual) n.z += load(residual + i);
    const Vec dz = load(dy + i) * derivative<kAct>(n.z, slope);
    store(dx + i, scale * (dz - m1 - n.x * m2));
    if (dresidual) store(dresidual + i, dz);
  }
  if (const int64_t rest = a.pixels - i; rest > 0) {
    Normalized n = normalize(load_some(x + i, rest));
    if (residual) n.z += load_some(residual + i, rest);
    const Vec dz = load_some(dy + i, rest) * derivative<kAct>(n.z, slope);
    store_some(dx + i, scale * (dz - m1 - n.x * m2), rest);
    if (dresidual) store_some(dresidual + i, dz, rest);
  }
}

template <class T, Act kAct>
void backward_planes(const NormActArgs& a) {
  for_planes(a, [&](int64_t first, int64_t end, int64_t channel, int64_t at) {
    double sum = 0, product = 0;
    for (int64_t image = first; image < end; ++image)
      add_plane_sums<T, kAct>(a, image, channel, sum, product);
    a.dbias[at] = static_cast<float>(sum);
    a.dweight[at] = static_cast<float>(product);
    const double count = a.frozen ? 0.0 : 1.0 / static_cast<double>((end - first) * a.pixels);
    for (int64_t image = first; image < end; ++image)
      backward_plane<T, kAct>(a, image, channel, static_cast<float>(sum * count),
                              static_cast<float>(product * count));
  });
}

// The numbers of a chunk of channels, with zeros past its last one.
struct Chunk {
  alignas(64) float mean[kChannelChunk], rstd[kChannelChunk], weight[kChannelChunk], bias[kChannelChunk];
  alignas(64) float sum[kChannelChunk], product[kChannelChunk];
  int64_t first;
  int count;

  P2PFAST_INLINE Normalized normalize(Vec x, int c) const {
    const Vec n = (x - load(mean + c)) * load(rstd + c);
    return {n, n * load(weight + c) + load(bias + c)};
  }
};

// Calls body(image, band, first pixel, pixels, chunk) for every band of every image and chunk of channels.
template <class F>
void for_bands(const NormActArgs& a, F&& body) {
  const int64_t bands = ceil_div(a.pixels, kNormBand), chunks = ceil_div(a.channels, kChannelChunk);
  parallel_for(a.images * bands * chunks, [&](int64_t task, int) {
    const int64_t image = task / chunks / bands, band = task / chunks % bands;
    Chunk chunk;
    chunk.first = task % chunks * kChannelChunk;
    chunk.count = static_cast<int>(min2<int64_t>(kChannelChunk, a.channels - chunk.first));
    const int64_t at = (a.over_batch ? 0 : image * a.channels) + chunk.first;
    for (int c = 0; c < kChannelChunk; ++c) {
      const bool real = c < chunk.count;
      chunk.mean[c] = real ? a.mean[at + c] : 0.0f;
      chunk.rstd[c] = real ? a.rstd[at + c] : 0.0f;
      chunk.weight[c] = real && a.weight ? a.weight[chunk.first + c] : 1.0f;
      chunk.bias[c] = real && a.bias ? a.bias[chunk.first + c] : 0.0f;
    }
    body(image, band, at, chunk);
  });
}

template <class T, Act kAct>
void sum_band(const NormActArgs& a, int64_t image, int64_t band, Chunk& chunk) {
  const Vec slope = splat(a.slope);
  for (int c = 0; c < kChannelChunk; ++c) chunk.sum[c] = chunk.product[c] = 0.0f;
  const int64_t end = min2(a.pixels, (band + 1) * kNormBand);
  for (int64_t p = band * kNormBand; p < end; ++p) {
    const int64_t first = (image * a.pixels + p) * a.channels + chunk.first;
    const T* const x = static_cast<const T*>(a.x) + first;
    const T* const dy = static_cast<const T*>(a.dy) + first;
    const T* const residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
    auto add = [&](int c, Vec value, Vec gradient, Vec more) {
      Normalized n = chunk.normalize(value, c);
      const Vec dz = gradient * derivative<kAct>(n.z + more, slope);
      store(chunk.sum + c, load(chunk.sum + c) + dz);
      store(chunk.product + c, load(chunk.product + c) + dz * n.x);
    };
    int c = 0;
    for (; c + kLanes <= chunk.count; c += kLanes)
      add(c, load(x + c), load(dy + c), residual ? load(residual + c) : Vec{});
    if (const int n = chunk.count - c; n > 0)
      add(c, load_some(x + c, n), load_some(dy + c, n), residual ? load_some(residual + c, n) : Vec{});
  }
}

template <class T, Act kAct>
void backward_band(const NormActArgs& a, int64_t image, int64_t band, const Chunk& chunk) {
  const Vec slope = splat(a.slope);
  const int64_t end = min2(a.pixels, (band + 1) * kNormBand);
  for (int64_t p = band * kNormBand; p < end; ++p) {
    const int64_t first = (image * a.pixels + p) * a.channels + chunk.first;
    const T* const x = static_cast<const T*>(a.x) + first;
    const T* const dy = static_cast<const T*>(a.dy) + first;
    const T* const residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
    T* const dx = static_cast<T*>(a.out) + first;
    T* const dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + first : nullptr;
    struct Two {
      Vec dx, dz;
    };
    auto run = [&](int c, Vec value, Vec gradient, Vec more) -> Two {
      const Normalized n = chunk.normalize(value, c);
      const Vec dz = gradient * derivative<kAct>(n.z + more, slope);
      const Vec scale = load(chunk.rstd + c) * load(chunk.weight + c);
      return {scale * (dz - load(chunk.sum + c) - n.x * load(chunk.product + c)), dz};
    };
    int c = 0;
    for (; c + kLanes <= chunk.count; c += kLanes) {
      const Two r = run(c, load(x + c), load(dy + c), residual ? load(residual + c) : Vec{});
      store(dx + c, r.dx);
      if (dresidual) store(dresidual + c, r.dz);
    }
    if (const int n = chunk.count - c; n > 0) {
      const Two r =
          run(c, load_some(x + c, n), load_some(dy + c, n), residual ? load_some(residual + c, n) : Vec{});
      store_some(dx + c, r.dx, n);
      if (dresidual) store_some(dresidual + c, r.dz, n);
    }
  }
}

template <class T, Act kAct>
void backward_bands(const NormActArgs& a) {
  const int64_t bands = ceil_div(a.pixels, kNormBand);
  for_bands(a, [&](int64_t image, int64_t band, int64_t, Chunk& chunk) {
    sum_band<T, kAct>(a, image, band, chunk);
    float* const to = a.partial + (image * bands + band) * 2 * a.channels + chunk.first;
    for (int c = 0; c < chunk.count; ++c) {
      to[c] = chunk.sum[c];
      to[a.channels + c] = chunk.product[c];
    }
  });
  const int64_t groups = ceil_div(a.channels, 16);
  parallel_for((a.over_batch ? 1 : a.images) * groups, [&](int64_t task, int) {
    const int64_t image = task / groups, parts = a.over_batch ? a.images * bands : bands;
    const int64_t end = min2(a.channels, task % groups * 16 + 16);
    for (int64_t c = task % groups * 16; c < end; ++c) {
      const float* from = a.partial + image * bands * 2 * a.channels + c;
      double sum = 0, product = 0;
      for (int64_t p = 0; p < parts; ++p, from += 2 * a.channels) {
        sum += from[0];
        product += from[a.channels];
      }
      a.dbias[image * a.channels + c] = static_cast<float>(sum);
      a.dweight[image * a.channels + c] = static_cast<float>(product);
    }
  });
  const double values = static_cast<double>(a.pixels) * static_cast<double>(a.over_batch ? a.images : 1);
  const float share = a.frozen ? 0.0f : static_cast<float>(1.0 / values);
  for_bands(a, [&](int64_t image, int64_t band, int64_t at, Chunk& chunk) {
    for (int c = 0; c < kChannelChunk; ++c) {
      const bool real = c < chunk.count;
      chunk.sum[c] = real ? a.dbias[at + c] * share : 0.0f;
      chunk.product[c] = real ? a.dweight[at + c] * share : 0.0f;
    }
    backward_band<T, kAct>(a, image, band, chunk);
  });
}

template <class T, Act kAct>
void backward(const NormActArgs& a) {
  a.planes ? backward_planes<T, kAct>(a) : backward_bands<T, kAct>(a);
}

template <class F>
void with_act(const NormActArgs& a, F&& call) {
  auto typed = [&]<Act kAct>() {
    a.dtype == DType::kFloat32 ? call.template operator()<float, kAct>()
                               : call.template operator()<bf16, kAct>();
  };
  switch (a.act) {
    case Act::kRelu:
      return typed.template operator()<Act::kRelu>();
    case Act::kLeaky:
      return typed.template operator()<Act::kLeaky>();
    case Act::kTanh:
      return typed.template operator()<Act::kTanh>();
    case Act::kSigmoid:
      return typed.template operator()<Act::kSigmoid>();
    case Act::kElu:
      return typed.template operator()<Act::kElu>();
    case Act::kSilu:
      return typed.template operator()<Act::kSilu>();
    default:
      return typed.template operator()<Act::kNone>();
  }
}

void run_forward(const NormActArgs& a) {
  with_act(a, [&]<class T, Act kAct>() { forward<T, kAct>(a); });
}

void run_backward(const NormActArgs& a) {
  with_act(a, [&]<class T, Act kAct>() { backward<T, kAct>(a); });
}

}  // namespace

const NormActKernels norm_act_kernels = {run_forward, run_backward};

}  // namespace p2pfast::P2PFAST_LEVEL
