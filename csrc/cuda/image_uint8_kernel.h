// Four pixels of a row a thread: three loads of 16 bytes and three stores of 4 where the layout allows it.
#pragma once

#include <cmath>

#include "cpu/image_uint8.h"
#include "cuda/numbers.h"
#include "cuda/phases.h"

namespace p2pfast::cuda {

template <class T, int kChannels>
struct ImageUint8Kernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 6;
  static constexpr int kPixels = 4;

  struct Args {
    ImageUint8 image;
    int64_t groups;       // of kPixels in a row
    bool planes, pixels;  // whether a group lies side by side, aligned: a channel's or all channels'
    bool words;           // whether a group's bytes are aligned words
  };
  struct Shared {};
  struct Local {};

  static int64_t blocks(const Args& a) {
    return ceil_div(a.image.images * a.image.height * a.groups, kThreads);
  }

  static P2PFAST_HD uint32_t quantized(float v, bool tanh) {
    if (tanh) v = tanhf(v);
    v = (v + 1.0f) * 127.5f;  // rounds as (v + 1) / 2 * 255 does
    v = v > 0.0f ? v : 0.0f;  // also for NaN
    return static_cast<uint32_t>(v < 255.0f ? v : 255.0f);
  }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    const ImageUint8& image = a.image;
    const int64_t group = block * kThreads + thread, row = group / a.groups;
    if (row >= image.images * image.height) return;
    const int64_t x = (group - row * a.groups) * kPixels, n = row / image.height;
    const T* const from = static_cast<const T*>(image.data) + n * image.image_stride +
                          (row - n * image.height) * image.row_stride + x * image.pixel_stride;
    uint8_t* const to = image.out + (row * image.width + x) * kChannels;
    const int count = static_cast<int>(min2<int64_t>(kPixels, image.width - x));

    T value[kPixels][kChannels];
    if (count == kPixels && a.planes) {
      P2PFAST_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const auto pack = load_pack<kPixels>(from + c * image.channel_stride);
        P2PFAST_UNROLL
        for (int i = 0; i < kPixels; ++i) value[i][c] = pack.value[i];
      }
    } else if (count == kPixels && a.pixels) {
      P2PFAST_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const auto pack = load_pack<kPixels>(from + c * kPixels);
        P2PFAST_UNROLL
        for (int i = 0; i < kPixels; ++i)
          value[(c * kPixels + i) / kChannels][(c * kPixels + i) % kChannels] = pack.value[i];
      }
    } else {
      P2PFAST_UNROLL
      for (int i = 0; i < kPixels; ++i) P2PFAST_UNROLL
      for (int c = 0; c < kChannels; ++c)
        value[i][c] = from[min2(i, count - 1) * image.pixel_stride + c * image.channel_stride];
    }

    uint32_t byte[kPixels * kChannels];
    P2PFAST_UNROLL
    for (int i = 0; i < kPixels; ++i) P2PFAST_UNROLL
    for (int c = 0; c < kChannels; ++c) byte[i * kChannels + c] = quantized(widened(value[i][c]), image.tanh);

    if (count == kPixels && a.words) {
      P2PFAST_UNROLL
      for (int c = 0; c < kChannels; ++c)
        reinterpret_cast<uint32_t*>(to)[c] =
            byte[4 * c] | byte[4 * c + 1] << 8 | byte[4 * c + 2] << 16 | byte[4 * c + 3] << 24;
    } else {
      P2PFAST_UNROLL
      for (int i = 0; i < kPixels * kChannels; ++i)
        if (i < count * kChannels) to[i] = static_cast<uint8_t>(byte[i]);
    }
  }
};

// The arguments for one type and number of channels.
template <class T, int kChannels>
typename ImageUint8Kernel<T, kChannels>::Args image_uint8_args(const ImageUint8& image) {
  using Kernel = ImageUint8Kernel<T, kChannels>;
  constexpr int64_t kPack = Kernel::kPixels;
  const auto aligned = [](int64_t stride) { return stride % kPack == 0; };
  const bool base = reinterpret_cast<uintptr_t>(image.data) % (kPack * sizeof(T)) == 0 &&
                    (aligned(image.image_stride) || image.images == 1) &&
                    (aligned(image.row_stride) || image.height == 1);
  typename Kernel::Args args{};
  args.image = image;
  args.groups = ceil_div(image.width, kPack);
  args.planes = base && image.pixel_stride == 1 && (kChannels == 1 || aligned(image.channel_stride));
  args.pixels = base && image.pixel_stride == kChannels && (kChannels == 1 || image.channel_stride == 1);
  args.words = reinterpret_cast<uintptr_t>(image.out) % 4 == 0 && image.width * kChannels % 4 == 0;
  return args;
}

// Calls f with the kernel and its arguments.
template <class F>
void with_image_uint8_kernel(const ImageUint8& image, F&& f) {
  const auto typed = [&]<class T>(T) {
    switch (image.channels) {
      case 1:
        return f.template operator()<ImageUint8Kernel<T, 1>>(image_uint8_args<T, 1>(image));
      case 2:
        return f.template operator()<ImageUint8Kernel<T, 2>>(image_uint8_args<T, 2>(image));
      case 3:
        return f.template operator()<ImageUint8Kernel<T, 3>>(image_uint8_args<T, 3>(image));
      default:
        return f.template operator()<ImageUint8Kernel<T, 4>>(image_uint8_args<T, 4>(image));
    }
  };
  switch (image.type) {
    case PixelType::kFloat32:
      return typed(float{});
    case PixelType::kBFloat16:
      return typed(BFloat16{});
    case PixelType::kFloat16:
      return typed(Float16{});
  }
}

}  // namespace p2pfast::cuda
