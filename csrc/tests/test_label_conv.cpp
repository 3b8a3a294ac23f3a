#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/label_conv.h"
#include "cpu/parallel.h"
#include "testing.h"

namespace {

using p2pfast::LabelConvShape;

struct Input {
  std::vector<uint8_t> labels, edges;
  std::vector<float> weight, bias;
};

Input make_input(const LabelConvShape& s) {
  p2pfast::testing::Random random(static_cast<uint64_t>(s.height * 1000 + s.width));
  Input in;
  const int64_t block = 1 + random.below(20);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t y = 0; y < s.height; ++y)
      for (int64_t x = 0; x < s.width; ++x) {
        in.labels.push_back(static_cast<uint8_t>((y / block * 5 + x / block * 3 + n) % s.classes));
        if (s.has_edges) in.edges.push_back(random.below(60) == 0 ? 255 : 0);
      }
  const int64_t channels = s.classes + (s.has_edges ? 1 : 0);
  for (int64_t i = 0; i < s.cout * channels * s.kernel * s.kernel; ++i)
    in.weight.push_back(random.uniform() - 0.5f);
  for (int64_t i = 0; i < s.cout; ++i) in.bias.push_back(random.uniform() + 2);
  return in;
}

// A dense image (height, width, channels), in double.
struct Image {
  int64_t height, width, channels;
  std::vector<double> data;
  double& at(int64_t y, int64_t x, int64_t c) {
    return data[static_cast<size_t>((y * width + x) * channels + c)];
  }
};

Image make_image(int64_t height, int64_t width, int64_t channels) {
  return {height, width, channels, std::vector<double>(static_cast<size_t>(height * width * channels))};
}

Image pooled(Image& in) {
  Image out = make_image((in.height + 1) / 2, (in.width + 1) / 2, in.channels);
  for (int64_t y = 0; y < out.height; ++y)
    for (int64_t x = 0; x < out.width; ++x)
      for (int64_t c = 0; c < in.channels; ++c) {
        double sum = 0;
        int pixels = 0;
        for (int64_t v = 2 * y - 1; v <= 2 * y + 1; ++v)
          for (int64_t u = 2 * x - 1; u <= 2 * x + 1; ++u)
            if (v >= 0 && v < in.height && u >= 0 && u < in.width) {
              sum += in.at(v, u, c);
              ++pixels;
            }
        out.at(y, x, c) = sum / pixels;
      }
  return out;
}

Image expected(const LabelConvShape& s, const Input& in, int64_t n) {
  const int64_t channels = s.classes + (s.has_edges ? 1 : 0);
  Image image = make_image(s.height, s.width, channels);
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t x = 0; x < s.width; ++x) {
      const size_t i = static_cast<size_t>((n * s.height + y) * s.width + x);
      image.at(y, x, in.labels[i]) = 1;
      if (s.has_edges) image.at(y, x, s.classes) = in.edges[i] != 0;
    }
  for (int i = 0; i < s.pool_levels; ++i) image = pooled(image);
  const auto index = [&](int64_t i, int64_t size) {
    return !s.reflect ? i : i < 0 ? -i : i < size ? i : 2 * size - 2 - i;
  };
  Image out = make_image(image.height, image.width, s.cout);
  for (int64_t y = 0; y < out.height; ++y)
    for (int64_t x = 0; x < out.width; ++x)
      for (int64_t o = 0; o < s.cout; ++o) {
        double sum = in.bias[static_cast<size_t>(o)];
        for (int64_t dy = 0; dy < s.kernel; ++dy)
          for (int64_t dx = 0; dx < s.kernel; ++dx) {
            const int64_t v = index(y + dy - s.kernel / 2, image.height);
            const int64_t u = index(x + dx - s.kernel / 2, image.width);
            if (v < 0 || v >= image.height || u < 0 || u >= image.width) continue;
            for (int64_t c = 0; c < channels; ++c)
              sum += image.at(v, u, c) *
                     in.weight[static_cast<size_t>(((o * channels + c) * s.kernel + dy) * s.kernel + dx)];
          }
        out.at(y, x, o) = sum;
      }
  return out;
}

// The buffers hold exactly what may be touched, so that AddressSanitizer sees a byte too many.
void compare(const LabelConvShape& s) {
  p2pfast::label_conv_check(s);
  const p2pfast::LabelConvLayout layout = p2pfast::label_conv_layout(s);
  const Input in = make_input(s);
  std::vector<float> packed(static_cast<size_t>(layout.packed_floats), NAN);
  std::vector<float> out(static_cast<size_t>(layout.output_elements), NAN);
  std::vector<uint16_t> half(out.size(), 0xffff);
  std::vector<float> partials(static_cast<size_t>(layout.partial_floats), NAN);
  std::vector<uint8_t> uniform(static_cast<size_t>(layout.uniform_bytes), 77);
  std::vector<uint64_t> scratch(static_cast<size_t>(layout.scratch_bytes / 8), ~uint64_t{0});
  const p2pfast::LabelConvKernels& kernels = p2pfast::label_conv();
  kernels.pack(s, in.weight.data(), in.bias.data(), packed.data());
  CHECK(kernels.max_label(in.labels.data(), static_cast<int64_t>(in.labels.size())) < s.classes);
  p2pfast::LabelConvArgs args{s,
                              in.labels.data(),
                              s.has_edges ? in.edges.data() : nullptr,
                              packed.data(),
                              out.data(),
                              false,
                              s.band_rows > 0 ? partials.data() : nullptr,
                              s.classes < 256 ? uniform.data() : nullptr,
                              scratch.data()};
  kernels.run(args);
  args.out = half.data();
  args.out_bf16 = true;
  kernels.run(args);

  for (int64_t n = 0; n < s.batch; ++n) {
    Image image = expected(s, in, n);
    bool same = true, rounded = true, padded = true;
    const size_t first = static_cast<size_t>(n * image.height * image.width * layout.stride);
    for (int64_t p = 0; p < image.height * image.width; ++p)
      for (int64_t c = 0; c < layout.stride; ++c) {
        const size_t i = first + static_cast<size_t>(p * layout.stride + c);
        const float wide = std::bit_cast<float>(static_cast<uint32_t>(half[i]) << 16);
        rounded = rounded && std::abs(wide - out[i]) <= std::abs(out[i]) / 256;
        if (c >= s.cout) {
          padded = padded && out[i] == 0;
        } else {
          same = same && std::abs(out[i] - image.data[static_cast<size_t>(p * s.cout + c)]) < 2e-5;
        }
      }
    CHECK(same);
    CHECK(rounded);
    CHECK(padded);
    for (int64_t b = 0; b < layout.bands; ++b)
      for (int64_t c = 0; c < s.cout; ++c) {
        double sum = 0, m2 = 0;
        const int64_t begin = b * s.band_rows * image.width;
        const int64_t end = std::min((b + 1) * s.band_rows, image.height) * image.width;
        for (int64_t p = begin; p < end; ++p) sum += image.data[static_cast<size_t>(p * s.cout + c)];
        const double mean = sum / static_cast<double>(end - begin);
        for (int64_t p = begin; p < end; ++p)
          m2 += std::pow(image.data[static_cast<size_t>(p * s.cout + c)] - mean, 2);
        const float* const got = partials.data() + (n * layout.bands + b) * 2 * layout.stride + c;
        CHECK(std::abs(got[0] - mean) < 1e-5);
        CHECK(std::abs(got[layout.stride] - m2) < 1e-4 * m2 + 1e-6);
      }
  }
}

TEST(label_conv_matches_naive) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const int threads : {1, 3}) {
      p2pfast::set_num_threads(threads);
      for (const bool reflect : {true, false}) {
        compare({1, 4, 4, 3, true, 3, 7, 0, reflect, 2});
        compare({2, 21, 131, 7, true, 17, 7, 0, reflect, 5});
        compare({1, 9, 64, 4, false, 16, 5, 0, reflect, 0});
        compare({1, 18, 61, 256, true, 2, 3, 0, reflect, 4});
        compare({1, 5, 63, 3, true, 4, 1, 0, reflect, 4});
        compare({2, 16, 130, 5, true, 5, 7, 1, reflect, 3});
        compare({1, 9, 129, 5, false, 35, 3, 1, reflect, 1});
        compare({1, 30, 77, 20, true, 6, 5, 2, reflect, 3});
      }
      compare({1, 1, 1, 2, true, 1, 7, 0, false, 1});
      compare({1, 1, 1, 2, true, 1, 7, 3, false, 1});
      compare({1, 3, 1030, 4, true, 4, 3, 1, false, 8});  // several tiles of pooling
    }
  });
  p2pfast::set_num_threads(2);
}

TEST(label_conv_random_shapes) {
  p2pfast::testing::at_every_level([](const char*) {
    p2pfast::testing::Random random(5);
    const auto pick = [&](int64_t low, int64_t high) { return low + random.below(high - low + 1); };
    int ran = 0;
    for (int i = 0; i < 60; ++i) {
      LabelConvShape s{};
      s.batch = pick(1, 2);
      s.height = pick(0, 20);
      s.width = random.below(4) == 0 ? pick(60, 140) : pick(0, 20);
      s.classes = static_cast<int32_t>(random.below(8) == 0 ? pick(250, 258) : pick(1, 9));
      s.has_edges = random.below(2) == 0;
      s.cout = static_cast<int32_t>(pick(0, 20));
      s.kernel = static_cast<int32_t>(pick(1, 8));
      s.pool_levels = static_cast<int32_t>(random.below(2) == 0 ? 0 : pick(0, 3));
      s.reflect = random.below(2) == 0;
      s.band_rows = pick(0, 6);
      try {
        p2pfast::label_conv_check(s);
      } catch (const std::invalid_argument&) {
        continue;
      }
      compare(s);
      ++ran;
    }
    CHECK(ran > 10);
  });
}

TEST(label_conv_checks_its_shape) {
  const LabelConvShape good{1, 8, 8, 5, true, 16, 7, 0, true, 0};
  const auto with = [&](auto change) {
    LabelConvShape shape = good;
    change(shape);
    return shape;
  };
  p2pfast::label_conv_check(good);
  using Bad = std::invalid_argument;
  CHECK_THROWS(p2pfast::label_conv_check(with([](auto& s) { s.classes = 257; })), Bad, "classes is 257");
  CHECK_THROWS(p2pfast::label_conv_check(with([](auto& s) { s.kernel = 4; })), Bad, "kernel is 4");
  CHECK_THROWS(p2pfast::label_conv_check(with([](auto& s) { s.width = 3; })), Bad, "smaller side is 3");
  CHECK_THROWS(p2pfast::label_conv_check(with([](auto& s) { s.pool_levels = 2; })), Bad, "smaller side is 2");
}

}  // namespace
