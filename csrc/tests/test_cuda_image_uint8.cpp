#include <cstdlib>
#include <vector>

#include "cpu/image_uint8.h"
#include "cpu/parallel.h"
#include "cuda/image_uint8_kernel.h"
#include "emulate.h"
#include "testing.h"

namespace {

using p2pfast::ImageUint8;
using p2pfast::PixelType;

// The same bytes as the CPU's kernel, and none besides them; after tanh, off by one at a step.
void compare(ImageUint8 image, int allowed) {
  const size_t size = static_cast<size_t>(image.images * image.height * image.width * image.channels);
  std::vector<uint8_t> expected(size + 8, 77), got(size + 8, 77);
  image.out = expected.data();
  p2pfast::image_uint8(image);
  image.out = got.data();
  p2pfast::cuda::with_image_uint8_kernel(image, []<class Kernel>(const typename Kernel::Args& args) {
    p2pfast::testing::emulate<Kernel>(args, Kernel::blocks(args));
  });
  int largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) largest = std::max(largest, std::abs(expected[i] - got[i]));
  CHECK(largest <= allowed);
  CHECK(got[size] == 77);
}

template <class T>
void layouts(PixelType type, const std::vector<T>& data, int64_t offset) {
  for (const bool tanh : {false, true})
    for (const int64_t channels : {1, 2, 3, 4})
      for (const int64_t width : {1, 3, 4, 16, 21}) {
        const int64_t height = 3;
        const auto run = [&](int64_t image_stride, int64_t channel_stride, int64_t row, int64_t pixel) {
          compare({data.data() + offset, type, 2, channels, height, width, image_stride, channel_stride, row,
                   pixel, tanh, nullptr},
                  tanh ? 1 : 0);
        };
        run(channels * height * width, height * width, width, 1);
        run(channels * height * width, 1, width * channels, channels);
        run(16 * height * width, 1, width * 16, 16);
        run(0, 7, 40, 1);
      }
}

TEST(cuda_image_uint8_matches_the_cpu) {
  p2pfast::testing::Random random(3);
  std::vector<float> wide(4096);
  for (float& v : wide) v = random.below(50) == 0 ? NAN : 2.6f * random.uniform() - 1.3f;
  // Every bit pattern of the small types, NaN and infinity among them.
  std::vector<uint16_t> narrow(1 << 16);
  for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<uint16_t>(i * 40503u);
  for (const int64_t offset : {0, 1}) {
    layouts(PixelType::kFloat32, wide, offset);
    layouts(PixelType::kBFloat16, narrow, offset);
    layouts(PixelType::kFloat16, narrow, offset);
  }
  for (const PixelType type : {PixelType::kBFloat16, PixelType::kFloat16})
    compare({narrow.data(), type, 1, 1, 256, 256, 0, 0, 256, 1, false, nullptr}, 0);
}

}  // namespace
