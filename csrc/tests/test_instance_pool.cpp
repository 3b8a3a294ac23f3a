#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cpu/instance_pool.h"
#include "cpu/parallel.h"
#include "cuda/instance_pool_kernel.h"
#include "emulate.h"
#include "testing.h"

namespace {

size_t size(int64_t n) { return static_cast<size_t>(n); }

// Numbers of instances and their sums, the plain way.
template <class T>
void compare(int64_t images, int64_t channels, int64_t pixels, int64_t instances, bool planes) {
  p2pfast::testing::Random random(static_cast<uint64_t>(pixels + instances));
  std::vector<T> ids;
  T id{};
  for (int64_t i = 0; i < images * pixels; ++i) {
    if (random.below(9) == 0 || instances > 500) id = static_cast<T>(random.below(instances) * 3000000019u);
    ids.push_back(id);
  }
  std::vector<float> features, out(size(images * channels * pixels + 1), NAN), emulated = out;
  for (int64_t i = 0; i < images * channels * pixels; ++i) features.push_back(random.uniform() + 100);
  const int64_t channel_stride = planes ? pixels : 1, pixel_stride = planes ? 1 : channels;
  const auto at = [&](int64_t n, int64_t c, int64_t p) {
    return size(n * channels * pixels + c * channel_stride + p * pixel_stride);
  };

  std::vector<int32_t> regions(size(images * pixels), -1);
  std::vector<int64_t> first(size(images + 1), -1);
  p2pfast::instance_regions(ids.data(), sizeof(T), images, pixels, regions.data(), first.data());
  p2pfast::instance_pool({features.data(), out.data(), images, channels, pixels, channels * pixels,
                          channel_stride, pixel_stride, regions.data(), first.data()});

  std::vector<int64_t> region(size(images * pixels)), order(region.size());
  for (int64_t i = 0; i < images * pixels; ++i) region[size(i)] = regions[size(i)] + first[size(i / pixels)];
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return region[size(a)] < region[size(b)]; });
  const int64_t count = first[size(images)] + 1;  // the last one is empty
  std::vector<int64_t> start(size(count + 1)), first_chunk(size(count + 1));
  for (const int64_t r : region) ++start[size(r + 1)];
  for (int64_t r = 0; r < count; ++r) {
    first_chunk[size(r + 1)] =
        first_chunk[size(r)] + p2pfast::cuda::ceil_div(start[size(r + 1)], p2pfast::cuda::kPoolChunk);
    start[size(r + 1)] += start[size(r)];
  }
  const int64_t chunks = images * pixels / p2pfast::cuda::kPoolChunk + count;
  std::vector<double> partials(size(chunks * channels), NAN);
  std::vector<float> means(size(count * channels), NAN);
  p2pfast::cuda::run_instance_pool(
      {features.data(), emulated.data(), 0, images, channels, pixels, channels * pixels, channel_stride,
       pixel_stride, region.data(), order.data(), start.data(), first_chunk.data(), count, chunks,
       partials.data(), means.data()},
      []<class Kernel>(const typename Kernel::Args& args, int64_t blocks) {
        p2pfast::testing::emulate<Kernel>(args, blocks, true);
      });

  bool same = true, close = true;
  for (int64_t n = 0; n < images; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      std::map<T, std::pair<double, int64_t>> sums;
      for (int64_t p = 0; p < pixels; ++p) {
        auto& sum = sums[ids[size(n * pixels + p)]];
        sum.first += features[at(n, c, p)];
        ++sum.second;
      }
      for (int64_t p = 0; p < pixels; ++p) {
        const auto& sum = sums[ids[size(n * pixels + p)]];
        const double mean = sum.first / static_cast<double>(sum.second);
        same = same && out[at(n, c, p)] == static_cast<float>(mean);
        close = close && std::abs(emulated[at(n, c, p)] - mean) <= 1e-6 * mean;
      }
    }
  CHECK(same);
  CHECK(close);
  CHECK(std::isnan(out.back()) && std::isnan(emulated.back()));
}

TEST(instance_pool_matches_naive_on_the_cpu_and_as_cuda_has_it) {
  for (const int threads : {1, 3}) {
    p2pfast::set_num_threads(threads);
    for (const bool planes : {true, false}) {
      compare<uint8_t>(2, 3, 301, 5, planes);
      compare<uint16_t>(1, 1, 1, 1, planes);
      compare<uint32_t>(3, 35, 200, 9, planes);
      compare<uint64_t>(1, 2, 9000, 2, planes);  // several chunks a region
      compare<uint64_t>(2, 1, 3000, 100000, planes);
    }
  }
  p2pfast::set_num_threads(2);
}

TEST(instance_pool_checks_its_arguments) {
  int32_t regions[4];
  int64_t first[2];
  const uint8_t ids[4] = {};
  using Bad = std::invalid_argument;
  CHECK_THROWS(p2pfast::instance_regions(ids, 3, 1, 4, regions, first), Bad, "element_size is 3");
  CHECK_THROWS(p2pfast::instance_regions(ids, 1, -1, 4, regions, first), Bad, "images is -1");
  CHECK_THROWS(p2pfast::instance_regions(ids, 1, 1, int64_t{1} << 31, regions, first), Bad,
               "pixels is 2147483648");
  CHECK_THROWS(p2pfast::instance_regions(nullptr, 1, 1, 4, regions, first), Bad, "ids or regions is null");
  CHECK_THROWS(p2pfast::instance_regions(ids, 1, 1, 4, regions, nullptr), Bad, "first is null");
  float values[4];
  CHECK_THROWS(p2pfast::instance_pool({values, nullptr, 1, 1, 4, 4, 4, 1, regions, first}), Bad,
               "out is null");
  CHECK_THROWS(p2pfast::instance_pool({values, values, 1, -1, 4, 4, 4, 1, regions, first}), Bad,
               "channels is -1");
  CHECK_THROWS(p2pfast::instance_pool({values, values, 1, 1, 4, 4, 4, 1, nullptr, first}), Bad,
               "regions or first");
}

}  // namespace
