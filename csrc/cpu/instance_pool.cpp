#include "cpu/instance_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"

namespace p2pfast {
namespace {

constexpr int64_t kGroup = 16;  // channels of a pixel that lie side by side are summed together

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("instance_pool: " + what); }

void check_sizes(int64_t images, int64_t pixels) {
  if (images < 0) fail("images is " + std::to_string(images) + "; it must not be negative");
  if (pixels < 0 || pixels > INT32_MAX)
    fail("pixels is " + std::to_string(pixels) + "; it must be from 0 to 2147483647");
}

// Numbers in order of appearance, by open addressing; grows so that at most half of it is filled.
class Numbers {
 public:
  Numbers() : keys_(1024), values_(1024, -1) {}

  int32_t of(uint64_t id) {
    size_t at = slot(id);
    if (values_[at] >= 0) return values_[at];
    if (static_cast<size_t>(count_) * 2 >= keys_.size()) {
      grow();
      at = slot(id);
    }
    keys_[at] = id;
    return values_[at] = count_++;
  }
  int32_t count() const { return count_; }

 private:
  size_t slot(uint64_t id) const {
    const size_t mask = keys_.size() - 1;
    size_t at = static_cast<size_t>((id * 0x9e3779b97f4a7c15u) >> 20) & mask;
    while (values_[at] >= 0 && keys_[at] != id) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    const std::vector<uint64_t> keys = std::move(keys_);
    const std::vector<int32_t> values = std::move(values_);
    keys_.assign(keys.size() * 2, 0);
    values_.assign(values.size() * 2, -1);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (values[i] < 0) continue;
      const size_t at = slot(keys[i]);
      keys_[at] = keys[i];
      values_[at] = values[i];
    }
  }

  std::vector<uint64_t> keys_;
  std::vector<int32_t> values_;
  int32_t count_ = 0;
};

template <class T>
int64_t number(const T* ids, int64_t pixels, int32_t* regions) {
  Numbers numbers;
  T last{};
  int32_t region = -1;
  for (int64_t i = 0; i < pixels; ++i) {
    if (region < 0 || ids[i] != last) {
      last = ids[i];
      region = numbers.of(last);
    }
    regions[i] = region;
  }
  return numbers.count();
}

}  // namespace

void instance_regions(const void* ids, int element_size, int64_t images, int64_t pixels, int32_t* regions,
                      int64_t* first) {
  check_sizes(images, pixels);
  if (element_size != 1 && element_size != 2 && element_size != 4 && element_size != 8)
    fail("element_size is " + std::to_string(element_size) + "; it must be 1, 2, 4 or 8");
  if (first == nullptr) fail("first is null");
  if (images * pixels > 0 && (ids == nullptr || regions == nullptr)) fail("ids or regions is null");
  parallel_for(images, [&](int64_t n, int) {
    int32_t* const out = regions + n * pixels;
    switch (element_size) {
      case 1:
        first[n + 1] = number(static_cast<const uint8_t*>(ids) + n * pixels, pixels, out);
        break;
      case 2:
        first[n + 1] = number(static_cast<const uint16_t*>(ids) + n * pixels, pixels, out);
        break;
      case 4:
        first[n + 1] = number(static_cast<const uint32_t*>(ids) + n * pixels, pixels, out);
        break;
      default:
        first[n + 1] = number(static_cast<const uint64_t*>(ids) + n * pixels, pixels, out);
    }
  });
  first[0] = 0;
  for (int64_t n = 0; n < images; ++n) first[n + 1] += first[n];
}

void instance_pool(const InstancePool& a) {
  check_sizes(a.images, a.pixels);
  if (a.channels < 0) fail("channels is " + std::to_string(a.channels) + "; it must not be negative");
  if (a.images == 0 || a.pixels == 0 || a.channels == 0) return;
  if (a.features == nullptr || a.out == nullptr) fail("features or out is null");
  if (a.regions == nullptr || a.first == nullptr) fail("regions or first is null");
  const int64_t group = a.channel_stride == 1 ? kGroup : 1;
  const int64_t groups = (a.channels + group - 1) / group;
  parallel_for(a.images * groups, [&](int64_t task, int) {
    const int64_t n = task / groups, c0 = task % groups * group, width = std::min(group, a.channels - c0);
    const int32_t* const regions = a.regions + n * a.pixels;
    const size_t count = static_cast<size_t>(a.first[n + 1] - a.first[n]);
    std::vector<double> sums(count * static_cast<size_t>(width));
    std::vector<int64_t> pixels(count);
    const int64_t begin = n * a.image_stride + c0 * a.channel_stride;
    const float* from = a.features + begin;
    for (int64_t p = 0; p < a.pixels; ++p, from += a.pixel_stride) {
      double* const sum = sums.data() + regions[p] * width;
      ++pixels[static_cast<size_t>(regions[p])];
      for (int64_t c = 0; c < width; ++c) sum[c] += from[c];
    }
    std::vector<float> means(sums.size());
    for (size_t i = 0; i < sums.size(); ++i)
      means[i] = static_cast<float>(sums[i] / static_cast<double>(pixels[i / static_cast<size_t>(width)]));
    float* to = a.out + begin;
    for (int64_t p = 0; p < a.pixels; ++p, to += a.pixel_stride)
      for (int64_t c = 0; c < width; ++c) to[c] = means[static_cast<size_t>(regions[p] * width + c)];
  });
}

}  // namespace p2pfast
