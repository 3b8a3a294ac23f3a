#include <cmath>
#include <functional>
#include <stdexcept>
#include <vector>

#include "cpu/norm_act.h"
#include "cpu/parallel.h"
#include "testing.h"

namespace {

using p2pfast::Act;
using p2pfast::DType;
using p2pfast::NormActArgs;

size_t size(int64_t n) { return static_cast<size_t>(n); }

// Values in memory of exactly their size: AddressSanitizer sees one too many.
std::vector<float> random_values(int64_t n, uint64_t seed, float offset) {
  p2pfast::testing::Random random(seed);
  std::vector<float> values(size(n));
  for (float& v : values) v = random.uniform() * 2 - 1 + offset;
  return values;
}

struct Shape {
  int64_t images, channels, pixels;
};

// One mean's pixels: sums over what f(image, pixel) says.
double sum_over(const Shape& s, bool over_batch, int64_t image,
                const std::function<double(int64_t, int64_t)>& f) {
  double sum = 0;
  for (int64_t n = over_batch ? 0 : image; n < (over_batch ? s.images : image + 1); ++n)
    for (int64_t p = 0; p < s.pixels; ++p) sum += f(n, p);
  return sum;
}

void compare(const Shape& s, bool planes, bool over_batch, bool with_residual) {
  const int64_t values = s.images * s.channels * s.pixels;
  const auto at = [&](int64_t n, int64_t c, int64_t p) {
    return size(planes ? (n * s.channels + c) * s.pixels + p : (n * s.pixels + p) * s.channels + c);
  };
  const std::vector<float> x = random_values(values, 1, 3), dy = random_values(values, 2, 0);
  const std::vector<float> residual = random_values(values, 3, 0);
  const std::vector<float> weight = random_values(s.channels, 4, 2), bias = random_values(s.channels, 5, 0);
  std::vector<float> y(size(values), NAN), dx = y, dresidual = y;
  std::vector<float> mean(size(over_batch ? s.channels : s.images * s.channels), NAN), variance = mean;
  std::vector<float> dweight(size(s.channels), NAN), dbias = dweight;
  NormActArgs a{};
  a.x = x.data();
  a.residual = with_residual ? residual.data() : nullptr;
  a.out = y.data();
  a.planes = planes;
  a.images = s.images;
  a.channels = s.channels;
  a.pixels = s.pixels;
  a.over_batch = over_batch;
  a.eps = 1e-5f;
  a.weight = weight.data();
  a.bias = bias.data();
  a.mean = mean.data();
  a.variance = variance.data();
  a.act = Act::kLeaky;
  a.slope = 0.25f;
  std::vector<float> workspace(size(p2pfast::norm_act_workspace(a)), NAN);
  a.workspace = workspace.data();
  p2pfast::norm_act_forward(a);
  a.dy = dy.data();
  a.out = dx.data();
  a.dresidual = with_residual ? dresidual.data() : nullptr;
  a.dweight = dweight.data();
  a.dbias = dbias.data();
  p2pfast::norm_act_backward(a);

  bool same = true;
  const auto near = [&](double got, double expected, double scale) {
    same = same && std::abs(got - expected) < 2e-5 * scale;
  };
  for (int64_t c = 0; c < s.channels; ++c) {
    double sum_weight = 0, sum_bias = 0, terms = 0;
    for (int64_t n = 0; n < s.images; ++n) {
      const double count = static_cast<double>((over_batch ? s.images : 1) * s.pixels);
      const double m =
          sum_over(s, over_batch, n, [&](int64_t i, int64_t p) { return x[at(i, c, p)]; }) / count;
      const double v =
          sum_over(s, over_batch, n, [&](int64_t i, int64_t p) { return std::pow(x[at(i, c, p)] - m, 2); }) /
          count;
      const double rstd = 1 / std::sqrt(v + 1e-5);
      near(mean[size((over_batch ? 0 : n * s.channels) + c)], m, 4);
      near(variance[size((over_batch ? 0 : n * s.channels) + c)], v, 1);
      const auto normal = [&](int64_t i, int64_t p) { return (x[at(i, c, p)] - m) * rstd; };
      const auto before = [&](int64_t i, int64_t p) {
        return normal(i, p) * weight[size(c)] + bias[size(c)] + (with_residual ? residual[at(i, c, p)] : 0);
      };
      const auto dz = [&](int64_t i, int64_t p) { return dy[at(i, c, p)] * (before(i, p) > 0 ? 1 : 0.25); };
      const double of_bias = sum_over(s, over_batch, n, dz);
      const double of_weight =
          sum_over(s, over_batch, n, [&](int64_t i, int64_t p) { return dz(i, p) * normal(i, p); });
      if (!over_batch || n == 0) sum_bias += of_bias, sum_weight += of_weight, terms += count;
      for (int64_t p = 0; p < s.pixels; ++p) {
        const double z = before(n, p), scale = 1 + rstd;
        if (std::abs(z) < 1e-4 * scale) continue;  // the derivative jumps
        near(y[at(n, c, p)], z > 0 ? z : 0.25 * z, 8 * scale);
        near(dx[at(n, c, p)],
             rstd * weight[size(c)] * (dz(n, p) - of_bias / count - normal(n, p) * of_weight / count),
             16 * scale);
        if (with_residual) near(dresidual[at(n, c, p)], dz(n, p), 1);
      }
    }
    near(dbias[size(c)], sum_bias, 1 + terms);
    near(dweight[size(c)], sum_weight, 1 + terms);
  }
  CHECK(same);
}

TEST(norm_act_forward_and_backward) {
  const Shape shapes[] = {{2, 3, 35},
                          {1, 20, 300},
                          {2, 33, 4},
                          {2, 131, 99},
                          {1, 64, 513},
                          // too many pixels for a slab
                          {1, 34, 3000}};
  p2pfast::testing::at_every_level([&](const char*) {
    for (const int threads : {1, 3}) {
      p2pfast::set_num_threads(threads);
      for (const Shape& shape : shapes) {
        for (int k = 0; k < 8; ++k) compare(shape, k & 1, k & 2, k & 4);
      }
    }
  });
  p2pfast::set_num_threads(2);
}

TEST(norm_act_refuses) {
  NormActArgs a{};
  a.images = a.channels = a.pixels = 1;
  CHECK_THROWS(p2pfast::norm_act_forward(a), std::invalid_argument, "x is null");
  a.channels = 0;
  CHECK_THROWS(p2pfast::norm_act_workspace(a), std::invalid_argument, "channels is 0");
}

}  // namespace
