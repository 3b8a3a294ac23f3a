#include <cmath>
#include <vector>

#include "cpu/norm.h"
#include "cpu/parallel.h"
#include "testing.h"

namespace {

using p2pfast::Act;
using p2pfast::DType;

size_t size(int64_t n) { return static_cast<size_t>(n); }
int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

// An image in NHWC with padding lanes or in NCHW, that holds exactly what may be touched.
struct Image {
  int images, height, width, channels;
  bool planes;
  std::vector<float> data;

  Image(int n, int h, int w, int c, bool nchw) : images(n), height(h), width(w), channels(c), planes(nchw) {
    data.assign(size(n * h * w * (nchw ? c : padded(c))), NAN);
  }
  int64_t room() const { return planes ? channels : padded(channels); }
  int64_t plane() const { return static_cast<int64_t>(height) * width; }
  float& at(int64_t n, int64_t y, int64_t x, int64_t c) {
    return data[size(planes ? ((n * channels + c) * height + y) * width + x
                            : ((n * height + y) * width + x) * room() + c)];
  }
  void randomise(uint64_t seed, float offset) {
    p2pfast::testing::Random random(seed);
    for (float& v : data) v = random.uniform() + offset;
  }
  p2pfast::Source source(const float* scale = nullptr, const float* shift = nullptr,
                         Act act = Act::kNone) const {
    return {data.data(),
            plane() * room(),
            width * (planes ? 1 : room()),
            planes ? 1 : room(),
            planes ? plane() : 1,
            DType::kFloat32,
            channels,
            scale,
            shift,
            padded(channels),
            act,
            0.25f};
  }
  p2pfast::Output output() {
    return {data.data(),         plane() * room(),     width * (planes ? 1 : room()),
            planes ? 1 : room(), planes ? plane() : 1, DType::kFloat32};
  }
};

void statistics_and_apply(int images, int height, int width, int channels, bool nchw) {
  const p2pfast::NormKernels& kernels = p2pfast::norm_kernels();
  Image x(images, height, width, channels, nchw), residual = x, out = x;
  x.randomise(1, 100);
  residual.randomise(2, -0.5f);
  p2pfast::StatisticsArgs gather{x.source(), images, height, width, channels, nullptr, nullptr};
  const int64_t parts = kernels.partials(gather), stride = padded(channels);
  std::vector<float> partial(size(images * parts * 2 * stride), NAN), count(size(images * parts), NAN);
  gather.partial = partial.data();
  gather.count = count.data();
  kernels.statistics(gather);

  std::vector<float> weight(size(channels), 2.0f), bias(size(channels), -1.0f);
  std::vector<float> scale(size(images * stride), NAN), shift = scale, mean = scale, variance = scale;
  for (const bool over_batch : {true, false}) {
    kernels.merge({partial.data(), count.data(), images, channels, parts, over_batch, 1e-5f, weight.data(),
                   bias.data(), scale.data(), shift.data(), mean.data(), variance.data()});
    for (int n = 0; n < images; ++n) {
      for (int c = 0; c < channels; ++c) {
        double sum = 0, m2 = 0, pixels = 0;
        for (int i = over_batch ? 0 : n; i < (over_batch ? images : n + 1); ++i)
          for (int64_t p = 0; p < x.plane(); ++p, ++pixels) sum += x.at(i, p / width, p % width, c);
        for (int i = over_batch ? 0 : n; i < (over_batch ? images : n + 1); ++i)
          for (int64_t p = 0; p < x.plane(); ++p)
            m2 += std::pow(x.at(i, p / width, p % width, c) - sum / pixels, 2);
        CHECK(std::abs(mean[size(n * stride + c)] - sum / pixels) < 1e-4);
        CHECK(std::abs(variance[size(n * stride + c)] - m2 / pixels) < 1e-4 * m2 / pixels + 1e-9);
      }
    }
  }

  std::vector<float> noise(size(images * channels * x.plane()));
  p2pfast::testing::Random random(3);
  for (float& v : noise) v = random.uniform() < 0.5f ? 0.0f : 2.0f;
  kernels.apply({x.source(scale.data(), shift.data(), Act::kLeaky), residual.source(), noise.data(), images,
                 height, width, channels, out.output(), Act::kRelu, 0.0f});
  bool same = true;
  for (int n = 0; n < images; ++n)
    for (int c = 0; c < channels; ++c)
      for (int64_t p = 0; p < x.plane(); ++p) {
        const size_t i = size(n * stride + c);
        const int64_t y = p / width, u = p % width;
        double v = static_cast<double>(x.at(n, y, u, c)) * scale[i] + shift[i];
        v = (v < 0 ? v * 0.25 : v) * noise[size((n * channels + c) * x.plane() + p)] +
            residual.at(n, y, u, c);
        same = same && std::abs(out.at(n, y, u, c) - (v < 0 ? 0 : v)) < 1e-3;
      }
  CHECK(same);
}

TEST(norm_statistics_merge_and_apply) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const int threads : {1, 3}) {
      p2pfast::set_num_threads(threads);
      for (const bool nchw : {false, true}) {
        statistics_and_apply(2, 5, 7, 3, nchw);
        statistics_and_apply(1, 1, 1, 1, nchw);
        statistics_and_apply(2, 17, 33, 20, nchw);
        statistics_and_apply(1, 3, 70, 130, nchw);
        statistics_and_apply(1, 2, 2050, 2, nchw);
      }
    }
  });
  p2pfast::set_num_threads(2);
}

TEST(norm_random_shapes) {
  p2pfast::testing::at_every_level([](const char*) {
    p2pfast::testing::Random random(6);
    const auto pick = [&](int low, int high) { return low + static_cast<int>(random.below(high - low + 1)); };
    for (int i = 0; i < 25; ++i) {
      const int width = random.below(6) == 0 ? pick(30, 80) : pick(1, 9);
      statistics_and_apply(pick(1, 3), pick(1, 20), width, pick(1, random.below(4) == 0 ? 140 : 20),
                           random.below(2) == 0);
    }
  });
}

void average(int height, int width, int channels, int kernel, int stride, int pad, bool include, bool nchw) {
  const auto side = [&](int length) { return (length + 2 * pad - kernel) / stride + 1; };
  Image x(2, height, width, channels, nchw), out(2, side(height), side(width), channels, nchw);
  x.randomise(4, 0);
  p2pfast::norm_kernels().avg_pool({x.source(), 2, height, width, channels, out.height, out.width, kernel,
                                    stride, pad, pad, include, out.output()});
  for (int n = 0; n < 2; ++n)
    for (int c = 0; c < channels; ++c)
      for (int y = 0; y < out.height; ++y)
        for (int u = 0; u < out.width; ++u) {
          double sum = 0;
          int inside = 0;
          for (int v = y * stride - pad; v < y * stride - pad + kernel; ++v)
            for (int w = u * stride - pad; w < u * stride - pad + kernel; ++w)
              if (v >= 0 && v < height && w >= 0 && w < width) {
                sum += x.at(n, v, w, c);
                ++inside;
              }
          CHECK(std::abs(out.at(n, y, u, c) - sum / (include ? kernel * kernel : inside)) < 1e-5);
        }
}

TEST(norm_avg_pool) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const bool nchw : {false, true}) {
      average(9, 8, 5, 3, 2, 1, false, nchw);
      average(1, 1, 1, 3, 2, 1, false, nchw);
      average(6, 7, 70, 2, 2, 0, true, nchw);
      average(5, 4, 18, 3, 1, 1, true, nchw);
    }
  });
}

}  // namespace
