#include <bit>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/weight_gradient.h"
#include "testing.h"

namespace {

using p2pfast::DType;
using p2pfast::Pad;
using p2pfast::WeightGradientAlgorithm;
using p2pfast::WeightGradientArgs;

struct Shape {
  int images, height, width, channels, out_channels, kernel, stride, pad;
  Pad mode = Pad::kZero;
};

// An image in NHWC, in memory of exactly its size: AddressSanitizer sees an element too many.
struct Image {
  int height, width, channels;
  std::vector<float> values;
  std::vector<uint16_t> halves;

  Image(int images, int h, int w, int c, bool half, p2pfast::testing::Random& random)
      : height(h), width(w), channels(c) {
    for (int64_t i = 0; i < int64_t{1} * images * h * w * c; ++i) {
      const auto bits = std::bit_cast<uint32_t>(random.uniform() + 0.5f) >> 16;
      values.push_back(std::bit_cast<float>(bits << 16));
      if (half) halves.push_back(static_cast<uint16_t>(bits));
    }
  }
  double at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return values[static_cast<size_t>(((n * height + y) * width + x) * channels + c)];
  }
  p2pfast::Source source() const {
    p2pfast::Source s{};
    const bool half = !halves.empty();
    s.data = half ? static_cast<const void*>(halves.data()) : values.data();
    s.pixel_stride = channels;
    s.row_stride = s.pixel_stride * width;
    s.image_stride = s.row_stride * height;
    s.channel_stride = 1;
    s.dtype = half ? DType::kBFloat16 : DType::kFloat32;
    s.channels = channels;
    return s;
  }
};

int64_t index(int64_t i, int64_t size, Pad mode) {
  if (i >= 0 && i < size) return i;
  if (mode == Pad::kZero) return -1;
  return i < 0 ? -i : 2 * size - 2 - i;
}

void compare(WeightGradientAlgorithm algorithm, const Shape& s, bool half) {
  p2pfast::testing::Random random(static_cast<uint64_t>(s.height * 100 + s.width));
  const int out_height = (s.height + 2 * s.pad - s.kernel) / s.stride + 1;
  const int out_width = (s.width + 2 * s.pad - s.kernel) / s.stride + 1;
  const Image x(s.images, s.height, s.width, s.channels, half, random);
  const Image grad(s.images, out_height, out_width, s.out_channels, half, random);
  WeightGradientArgs args{};
  args.conv.source[0] = x.source();
  args.conv.sources = 1;
  args.conv.images = s.images;
  args.conv.height = s.height;
  args.conv.width = s.width;
  args.conv.out_height = out_height;
  args.conv.out_width = out_width;
  args.conv.out_channels = s.out_channels;
  args.conv.kernel_h = args.conv.kernel_w = s.kernel;
  args.conv.stride = s.stride;
  args.conv.pad_top = args.conv.pad_left = s.pad;
  args.conv.pad = s.mode;
  args.grad = grad.source();
  const int64_t weights = int64_t{1} * s.out_channels * s.channels * s.kernel * s.kernel;
  std::vector<float> out(static_cast<size_t>(weights), NAN);
  args.out = out.data();
  const auto& kernel = p2pfast::weight_gradient_kernel(algorithm);
  if (kernel.refuses(args) != nullptr) return;
  const int64_t bytes = kernel.workspace_bytes(args, p2pfast::num_threads());
  std::vector<unsigned char> workspace(static_cast<size_t>(bytes + 64), 255);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data());
  args.workspace = workspace.data() + (64 - address % 64) % 64;
  kernel.run(args);
  bool same = true;
  for (int64_t i = 0; i < weights; ++i) {
    const int64_t kx = i % s.kernel, ky = i / s.kernel % s.kernel, c = i / s.kernel / s.kernel % s.channels;
    const int64_t o = i / s.kernel / s.kernel / s.channels;
    double sum = 0;
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t oy = 0; oy < out_height; ++oy) {
        for (int64_t ox = 0; ox < out_width; ++ox) {
          const int64_t y = index(oy * s.stride + ky - s.pad, s.height, s.mode);
          const int64_t at = index(ox * s.stride + kx - s.pad, s.width, s.mode);
          if (y >= 0 && at >= 0 && y < s.height && at < s.width)
            sum += grad.at(n, oy, ox, o) * x.at(n, y, at, c);
        }
      }
    }
    same = same && std::abs(out[static_cast<size_t>(i)] - sum) < 1e-4 * (1 + std::abs(sum));
  }
  CHECK(same);
}

const Shape kShapes[] = {
    {2, 5, 6, 3, 7, 3, 1, 1, Pad::kReflect},
    {1, 4, 9, 17, 20, 3, 1, 1},
    {1, 7, 5, 33, 6, 3, 2, 1},
    {1, 6, 8, 16, 50, 4, 2, 1},
    {2, 2, 2, 5, 16, 4, 2, 1},
    {1, 3, 4, 66, 9, 4, 1, 2},
    {1, 9, 131, 2, 3, 7, 1, 3},
    {1, 5, 67, 3, 18, 7, 2, 3},
    {1, 1, 1, 1, 1, 1, 1, 0},
    {1, 3, 2, 36, 5, 5, 3, 2},
    {1, 2, 1, 40, 49, 3, 1, 1},
};

TEST(weight_gradients_match_naive) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const Shape& shape : kShapes) {
      for (int a = 0; a < p2pfast::kWeightGradientAlgorithms; ++a) {
        p2pfast::set_num_threads(1 + a % 3);
        for (const bool half : {false, true}) compare(static_cast<WeightGradientAlgorithm>(a), shape, half);
      }
    }
  });
  p2pfast::set_num_threads(2);
}

}  // namespace
