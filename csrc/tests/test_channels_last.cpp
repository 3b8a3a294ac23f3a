#include <bit>
#include <stdexcept>
#include <vector>

#include "cpu/channels_last.h"
#include "cpu/parallel.h"
#include "testing.h"

namespace {

using p2pfast::ChannelsLast;
using p2pfast::DType;

// Both buffers end with the last value that may be touched.
template <class From, class To>
void compare(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t gap) {
  const int64_t row = width + gap, plane = height * row, image = channels * plane;
  std::vector<From> from(static_cast<size_t>(images * image - gap));
  p2pfast::testing::Random random(static_cast<uint64_t>(channels));
  std::vector<float> values;
  for (From& v : from) {
    // Values of few bits, which every type holds.
    const float value = static_cast<float>(random.below(256)) - 128.0f;
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    values.push_back(value);
    if constexpr (sizeof(From) == 2) {
      v = static_cast<From>(bits >> 16);
    } else {
      v = std::bit_cast<From>(bits);
    }
  }
  std::vector<To> out(static_cast<size_t>(images * channels * height * width));
  const auto dtype = [](size_t bytes) { return bytes == 2 ? DType::kBFloat16 : DType::kFloat32; };
  p2pfast::channels_last({from.data(), dtype(sizeof(From)), images, channels, height, width, image, plane,
                          row, out.data(), dtype(sizeof(To))});
  bool same = true;
  size_t i = 0;
  for (int64_t n = 0; n < images; ++n)
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; ++c, ++i) {
          const uint32_t bits = static_cast<uint32_t>(out[i]) << (sizeof(To) == 2 ? 16 : 0);
          same = same && std::bit_cast<float>(bits) ==
                             values[static_cast<size_t>(n * image + c * plane + y * row + x)];
        }
  CHECK(same);
}

TEST(channels_last_layouts) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const int64_t gap : {0, 3}) {
      for (const int64_t channels : {1, 3, 16, 20, 37}) {
        compare<uint32_t, uint32_t>(2, channels, 3, 19, gap);
        compare<uint32_t, uint16_t>(1, channels, 5, 16, gap);
        compare<uint16_t, uint16_t>(1, channels, 2, 1030, gap);
        compare<uint16_t, uint32_t>(1, channels, 1, 1, gap);
      }
    }
  });
}

TEST(channels_last_refuses) {
  ChannelsLast a{};
  p2pfast::channels_last(a);  // nothing to do
  a.images = a.channels = a.height = a.width = 1;
  CHECK_THROWS(p2pfast::channels_last(a), std::invalid_argument, "null");
  a.height = -2;
  CHECK_THROWS(p2pfast::channels_last(a), std::invalid_argument, "height is -2");
}

}  // namespace
