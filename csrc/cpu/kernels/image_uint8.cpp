#include "cpu/image_uint8.h"

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int64_t kTile = 256;  // pixels
constexpr int64_t kTaskPixels = 1 << 14;
constexpr int kMaxChannels = 4;

template <bool kTanh>
P2PFAST_INLINE VecI quantized(Vec v) {
  if constexpr (kTanh) v = tanh_vec(v);
  v = (v + 1.0f) * 127.5f;   // rounds as (v + 1) / 2 * 255 does
  v = v > 0.0f ? v : Vec{};  // also for NaN
  v = v < 255.0f ? v : splat(255.0f);
  return __builtin_convertvector(v, VecI);
}

// count values side by side; `to` has room for the next multiple of kLanes.
template <class T, bool kTanh>
void quantize(const T* from, int64_t count, int32_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VecI q = quantized<kTanh>(load(from + i));
    std::memcpy(to + i, &q, sizeof(q));
  }
  if (i == count) return;
  T rest[kLanes] = {};
  std::memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(T));
  const VecI q = quantized<kTanh>(load(rest));
  std::memcpy(to + i, &q, sizeof(q));
}

// A run of pixels of one row: `from` is its first value, `to` its first byte.
template <class T, bool kTanh>
void convert_pixels(const ImageUint8& a, const T* from, int64_t pixels, uint8_t* to) {
  alignas(64) int32_t values[kMaxChannels][kTile];
  int32_t* const flat = values[0];
  const int64_t channels = a.channels;
  const bool dense =
      channels == 1 ? a.pixel_stride == 1 : a.channel_stride == 1 && a.pixel_stride == channels;
  for (int64_t x = 0; x < pixels; x += kTile) {
    const int64_t n = min2(kTile, pixels - x);
    const T* const p = from + x * a.pixel_stride;
    uint8_t* const out = to + x * channels;
    if (a.pixel_stride == 1 && channels > 1) {
      for (int64_t c = 0; c < channels; ++c) quantize<T, kTanh>(p + c * a.channel_stride, n, values[c]);
      if (channels == 3) {
        for (int64_t i = 0; i < n; ++i)
          for (int64_t c = 0; c < 3; ++c) out[i * 3 + c] = static_cast<uint8_t>(values[c][i]);
      } else {
        for (int64_t i = 0; i < n; ++i)
          for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = static_cast<uint8_t>(values[c][i]);
      }
      continue;
    }
    if (dense) {
      quantize<T, kTanh>(p, n * channels, flat);
    } else {
      alignas(64) T gathered[kMaxChannels * kTile];
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < channels; ++c)
          gathered[i * channels + c] = p[i * a.pixel_stride + c * a.channel_stride];
      quantize<T, kTanh>(gathered, n * channels, flat);
    }
    for (int64_t i = 0; i < n * channels; ++i) out[i] = static_cast<uint8_t>(flat[i]);
  }
}

template <class T, bool kTanh>
void convert(const ImageUint8& a) {
  const int64_t rows = max2<int64_t>(1, kTaskPixels / a.width);
  const int64_t all = a.images * a.height;
  parallel_for(ceil_div(all, rows), [&](int64_t task, int) {
    const int64_t end = min2((task + 1) * rows, all);
    for (int64_t row = task * rows; row < end; ++row) {
      const T* const from =
          static_cast<const T*>(a.data) + row / a.height * a.image_stride + row % a.height * a.row_stride;
      convert_pixels<T, kTanh>(a, from, a.width, a.out + row * a.width * a.channels);
    }
  });
}

void run(const ImageUint8& a) {
  switch (a.type) {
    case PixelType::kFloat32:
      return a.tanh ? convert<float, true>(a) : convert<float, false>(a);
    case PixelType::kBFloat16:
      return a.tanh ? convert<bf16, true>(a) : convert<bf16, false>(a);
    case PixelType::kFloat16:
      return a.tanh ? convert<Half, true>(a) : convert<Half, false>(a);
  }
}

}  // namespace

const ImageUint8Kernels image_uint8_kernels = {run};

}  // namespace p2pfast::P2PFAST_LEVEL
