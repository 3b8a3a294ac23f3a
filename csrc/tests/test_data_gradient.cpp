#include <bit>
#include <cmath>
#include <vector>

#include "cpu/data_gradient.h"
#include "cpu/parallel.h"
#include "testing.h"

namespace {

using p2pfast::DataGradientArgs;
using p2pfast::DType;
using p2pfast::Pad;

struct Shape {
  int images, height, width, channels, out_channels, pad;
  Pad mode = Pad::kZero;
};

float rounded(float v) { return std::bit_cast<float>(std::bit_cast<uint32_t>(v) & 0xffff0000u); }

// `count` values that bfloat16 has, in memory of exactly their size: AddressSanitizer sees an element too
// many.
struct Values {
  std::vector<float> values;
  std::vector<uint16_t> halves;

  Values(int64_t count, bool half, p2pfast::testing::Random& random) {
    for (int64_t i = 0; i < count; ++i) values.push_back(rounded(random.uniform() - 0.5f));
    if (half)
      for (const float v : values) halves.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16));
  }
  const void* data() const {
    return halves.empty() ? static_cast<const void*>(values.data()) : halves.data();
  }
  DType dtype() const { return halves.empty() ? DType::kFloat32 : DType::kBFloat16; }
};

int64_t index(int64_t i, int64_t size, Pad mode) {
  if (i >= 0 && i < size) return i;
  if (mode == Pad::kZero) return -1;
  if (mode == Pad::kReplicate) return i < 0 ? 0 : size - 1;
  return i < 0 ? -i : 2 * size - 2 - i;
}

// Every output pixel gives its gradient back to what it was made of.
std::vector<double> expected(const Shape& s, int out_height, int out_width, const Values& grad,
                             const Values& weight) {
  std::vector<double> sums(static_cast<size_t>(s.images) * s.height * s.width * s.channels);
  for (int64_t pixel = 0; pixel < int64_t{1} * s.images * out_height * out_width; ++pixel) {
    const int64_t n = pixel / out_width / out_height, oy = pixel / out_width % out_height;
    for (int tap = 0; tap < 9; ++tap) {
      const int64_t y = index(oy + tap / 3 - s.pad, s.height, s.mode);
      const int64_t x = index(pixel % out_width + tap % 3 - s.pad, s.width, s.mode);
      if (y < 0 || x < 0) continue;
      for (int c = 0; c < s.channels; ++c) {
        double& sum = sums[static_cast<size_t>(((n * s.height + y) * s.width + x) * s.channels + c)];
        for (int o = 0; o < s.out_channels; ++o)
          sum += static_cast<double>(grad.values[static_cast<size_t>(pixel * s.out_channels + o)]) *
                 weight.values[static_cast<size_t>((o * s.channels + c) * 9 + tap)];
      }
    }
  }
  return sums;
}

void compare(const Shape& s, bool half) {
  p2pfast::testing::Random random(static_cast<uint64_t>(s.height * 100 + s.width));
  const int out_height = s.height + 2 * s.pad - 2, out_width = s.width + 2 * s.pad - 2;
  const Values grad(int64_t{1} * s.images * out_height * out_width * s.out_channels, half, random);
  const Values weight(int64_t{9} * s.channels * s.out_channels, half, random);
  DataGradientArgs args{};
  args.conv.source[0].channels = s.channels;
  args.conv.sources = 1;
  args.conv.images = s.images;
  args.conv.height = s.height;
  args.conv.width = s.width;
  args.conv.out_height = out_height;
  args.conv.out_width = out_width;
  args.conv.out_channels = s.out_channels;
  args.conv.kernel_h = args.conv.kernel_w = 3;
  args.conv.stride = 1;
  args.conv.pad_top = args.conv.pad_left = s.pad;
  args.conv.pad = s.mode;
  args.conv.weight = weight.data();
  args.conv.weight_dtype = weight.dtype();
  args.conv.weight_out_stride = 9 * s.channels;
  args.conv.weight_in_stride = 9;
  args.grad.data = grad.data();
  args.grad.dtype = grad.dtype();
  args.grad.channels = s.out_channels;
  args.grad.channel_stride = 1;
  args.grad.pixel_stride = s.out_channels;
  args.grad.row_stride = args.grad.pixel_stride * out_width;
  args.grad.image_stride = args.grad.row_stride * out_height;
  const std::vector<double> sums = expected(s, out_height, out_width, grad, weight);
  std::vector<float> out(half ? 0 : sums.size(), NAN);
  std::vector<uint16_t> half_out(half ? sums.size() : 0, 0xffff);
  args.out.data = half ? static_cast<void*>(half_out.data()) : out.data();
  args.out.dtype = grad.dtype();
  args.out.channel_stride = 1;
  args.out.pixel_stride = s.channels;
  args.out.row_stride = args.out.pixel_stride * s.width;
  args.out.image_stride = args.out.row_stride * s.height;
  const auto& kernel = p2pfast::data_gradient();
  CHECK(kernel.refuses(args) == nullptr);
  const int64_t bytes = kernel.workspace_bytes(args, p2pfast::num_threads());
  std::vector<unsigned char> workspace(static_cast<size_t>(bytes + 64), 255);
  const size_t skip = (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
  args.workspace = workspace.data() + skip;
  kernel.run(args);
  for (size_t i = 0; i < skip; ++i) CHECK(workspace[i] == 255);
  for (size_t i = static_cast<size_t>(bytes) + skip; i < workspace.size(); ++i) CHECK(workspace[i] == 255);
  bool same = true;
  for (size_t i = 0; i < sums.size(); ++i) {
    const double got = half ? std::bit_cast<float>(static_cast<uint32_t>(half_out[i]) << 16) : out[i];
    same = same && std::abs(got - sums[i]) < (half ? 1e-2 : 5e-5) * (1 + std::abs(sums[i]));
  }
  CHECK(same);
}

const Shape kShapes[] = {
    {2, 5, 7, 3, 7, 1, Pad::kReflect},
    {1, 17, 33, 18, 20, 1, Pad::kReflect},
    {1, 2, 3, 70, 33, 1, Pad::kReflect},
    {2, 9, 6, 130, 5, 2, Pad::kReflect},
    {1, 1, 1, 3, 40, 1, Pad::kReplicate},
    {2, 1, 6, 66, 1, 3, Pad::kReplicate},
    {3, 36, 40, 4, 3, 1, Pad::kReplicate},
    {1, 8, 8, 16, 16, 1},
    {2, 4, 9, 1, 4, 2},
    {1, 3, 4, 20, 6, 3},
    {1, 6, 5, 17, 65, 0},
};

TEST(data_gradients_match_naive) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const Shape& shape : kShapes) {
      for (const bool half : {false, true}) {
        p2pfast::set_num_threads(1 + shape.width % 3);
        compare(shape, half);
      }
    }
  });
  p2pfast::set_num_threads(2);
}

}  // namespace
