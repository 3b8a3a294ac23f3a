// The CUDA kernels on the host, against the CPU's: tables and full-resolution outputs equal bit by bit, since
// the order of summation is the same.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/instance_edges.h"
#include "cpu/label_conv.h"
#include "cpu/parallel.h"
#include "cuda/label_conv_kernel.h"
#include "emulate.h"
#include "testing.h"

namespace {

using p2pfast::LabelConvShape;
using p2pfast::cuda::LabelConvCall;
using p2pfast::cuda::StoredType;

size_t size(int64_t n) { return static_cast<size_t>(n); }

struct Emulator {
  bool backwards;
  template <class Kernel>
  void operator()(const typename Kernel::Args& args, int64_t blocks) const {
    p2pfast::testing::emulate<Kernel>(args, blocks, backwards);
  }
};

struct Scene {
  LabelConvShape shape;
  p2pfast::LabelConvLayout layout;
  std::vector<uint8_t> labels, edges, uniform;
  std::vector<uint32_t> ids;
  std::vector<float> packed, out;

  // Blocks of labels with some pixels of others, instances with some pixels of others; the CPU's results.
  explicit Scene(const LabelConvShape& s) : shape(s), layout(p2pfast::label_conv_layout(s)) {
    p2pfast::label_conv_check(s);
    p2pfast::testing::Random random(static_cast<uint64_t>(s.height * 1000 + s.width + s.classes));
    const int64_t block = 1 + random.below(20), noise = 5 + random.below(200);
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t y = 0; y < s.height; ++y)
        for (int64_t x = 0; x < s.width; ++x) {
          const int64_t label = (y / block * 5 + x / block * 3 + n) % s.classes;
          labels.push_back(static_cast<uint8_t>(random.below(noise) == 0 ? random.below(s.classes) : label));
          ids.push_back(
              static_cast<uint32_t>(random.below(2 * noise) == 0 ? random.below(1 << 20) : label * 99999));
        }
    edges.resize(ids.size());
    p2pfast::instance_edges(
        {ids.data(), 4, edges.data(), s.batch, s.height, s.width, s.height * s.width, s.width});
    if (!s.has_edges) edges.clear();

    std::vector<float> weight, bias;
    for (int64_t i = 0; i < s.cout * layout.channels * s.kernel * s.kernel; ++i)
      weight.push_back(random.uniform() - 0.5f);
    for (int64_t i = 0; i < s.cout; ++i) bias.push_back(random.uniform() + 20);
    packed.assign(size(layout.packed_floats), NAN);
    p2pfast::label_conv().pack(s, weight.data(), bias.data(), packed.data());
    std::vector<float> again(packed.size(), NAN);
    const p2pfast::cuda::LabelPackKernel::Args pack{layout,      s.classes,     s.cout,      s.kernel,
                                                    s.has_edges, weight.data(), bias.data(), again.data()};
    p2pfast::testing::emulate<p2pfast::cuda::LabelPackKernel>(pack,
                                                              p2pfast::cuda::LabelPackKernel::blocks(pack));
    CHECK(again == packed);

    out.assign(size(layout.output_elements), NAN);
    uniform.assign(size(layout.uniform_bytes), 77);
    std::vector<uint64_t> scratch(size(layout.scratch_bytes / 8));
    p2pfast::label_conv().run({s, labels.data(), s.has_edges ? edges.data() : nullptr, packed.data(),
                               out.data(), false, nullptr, s.classes < 256 ? uniform.data() : nullptr,
                               scratch.data()});
  }

  float expected(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return out[size(((n * layout.out_height + y) * layout.out_width + x) * layout.stride + c)];
  }
};

template <class T>
void compare(const Scene& scene, StoredType type, int label_bytes, bool from_ids, bool backwards,
             int64_t spare, int64_t row_begin = 0, int64_t row_end = 0) {
  const LabelConvShape& s = scene.shape;
  const int64_t height = scene.layout.out_height, width = scene.layout.out_width;
  const int64_t rows = (row_end > 0 ? row_end : height) - row_begin;
  const int64_t parts = p2pfast::cuda::label_conv_tiles(rows, width), stride = s.cout + spare;
  std::vector<uint8_t> labels(scene.labels.size() * size(label_bytes));
  for (size_t i = 0; i < scene.labels.size(); ++i) labels[i * size(label_bytes)] = scene.labels[i];
  T poison;
  std::memset(&poison, 0xff, sizeof(T));
  std::vector<T> out(size(s.batch * rows * width * stride), poison);
  std::vector<float> partials(size(s.batch * parts * 2 * s.cout), NAN), counts(size(parts), NAN);
  std::vector<uint8_t> uniform(size(s.batch * rows * width), 77);
  std::vector<uint64_t> scratch(size(p2pfast::cuda::label_conv_scratch(s, nullptr, nullptr) / 8),
                                ~uint64_t{0});
  LabelConvCall call{};
  call.shape = s;
  call.labels = labels.data();
  call.label_bytes = label_bytes;
  if (s.has_edges && from_ids) {
    call.ids = scene.ids.data();
    call.id_bytes = 4;
  } else if (s.has_edges) {
    call.edges = scene.edges.data();
  }
  call.packed = scene.packed.data();
  call.out = out.data();
  call.type = type;
  call.out_stride = stride;
  call.partials = partials.data();
  call.counts = counts.data();
  call.uniform = s.classes < 256 ? uniform.data() : nullptr;
  call.scratch = scratch.data();
  call.row_begin = row_begin;
  call.row_end = row_end;
  p2pfast::cuda::run_label_conv(call, Emulator{backwards});

  bool same = true, untouched = true, windows = true;
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < width; ++x) {
        const int64_t pixel = (n * rows + y) * width + x;
        for (int64_t c = 0; c < stride; ++c) {
          const T got = out[size(pixel * stride + c)];
          if (c >= s.cout) {
            untouched = untouched && std::memcmp(&got, &poison, sizeof(T)) == 0;
            continue;
          }
          const float want = scene.expected(n, y + row_begin, x, c);
          T rounded;
          p2pfast::cuda::narrow(want, &rounded);
          if (s.pool_levels == 0) {
            same = same && std::memcmp(&got, &rounded, sizeof(T)) == 0;
          } else {
            const float step = sizeof(T) == 4 ? 2e-6f : 0x1p-7f;
            same = same && std::abs(p2pfast::cuda::widened(got) - want) <= step * std::abs(want);
          }
        }
        windows = windows &&
                  (s.classes > 255 ||
                   uniform[size(pixel)] == scene.uniform[size((n * height + y + row_begin) * width + x)]);
      }
  CHECK(same);
  CHECK(untouched);
  CHECK(windows);

  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t across = p2pfast::cuda::ceil_div(width, p2pfast::cuda::kTileWidth);
      const int64_t y0 = part / across * p2pfast::cuda::kTileHeight,
                    x0 = part % across * p2pfast::cuda::kTileWidth;
      const int64_t y1 = std::min(y0 + p2pfast::cuda::kTileHeight, rows);
      const int64_t x1 = std::min(x0 + p2pfast::cuda::kTileWidth, width);
      const double count = static_cast<double>((y1 - y0) * (x1 - x0));
      CHECK(counts[size(part)] == count);
      for (int64_t c = 0; c < s.cout; ++c) {
        double sum = 0, m2 = 0;
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) sum += scene.expected(n, y + row_begin, x, c);
        const double mean = sum / count;
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) m2 += std::pow(scene.expected(n, y + row_begin, x, c) - mean, 2);
        const float* const got = partials.data() + (n * parts + part) * 2 * s.cout + c;
        CHECK(std::abs(got[0] - mean) <= 4e-7 * std::abs(mean));
        CHECK(std::abs(got[s.cout] - m2) <= 2e-5 * m2 + count * 1e-11);
      }
    }
}

void compare(const LabelConvShape& s) {
  const Scene scene(s);
  compare<float>(scene, StoredType::kFloat32, 1, false, false, 0);
  compare<float>(scene, StoredType::kFloat32, 8, true, true, 3);
  compare<p2pfast::cuda::BFloat16>(scene, StoredType::kBFloat16, 4, true, false, 4);
  compare<p2pfast::cuda::Float16>(scene, StoredType::kFloat16, 2, false, true, 0);
  const int64_t height = scene.layout.out_height;
  if (height > 2) compare<float>(scene, StoredType::kFloat32, 1, false, false, 0, 1, height - 1);
}

TEST(cuda_label_conv_matches_the_cpu) {
  for (const bool reflect : {true, false}) {
    compare({1, 4, 4, 3, true, 3, 7, 0, reflect, 0});
    compare({2, 21, 131, 7, true, 17, 7, 0, reflect, 0});
    compare({1, 20, 64, 35, true, 32, 7, 0, reflect, 0});
    compare({1, 9, 65, 4, false, 64, 5, 0, reflect, 0});
    compare(
        {1, 11, 67, 70, true, 68, 3, 0, reflect, 0});  // constants that do not fit, two blocks of channels
    compare({1, 18, 61, 256, true, 2, 3, 0, reflect, 0});
    compare({1, 5, 63, 3, true, 4, 1, 0, reflect, 0});
  }
  compare({1, 1, 1, 2, true, 1, 7, 0, false, 0});
}

TEST(cuda_label_conv_matches_the_cpu_at_pooled_resolution) {
  for (const bool reflect : {true, false}) {
    compare({2, 34, 150, 5, true, 32, 7, 1, reflect, 0});
    compare({1, 9, 129, 5, false, 35, 3, 1, reflect, 0});
    compare({1, 30, 77, 20, true, 6, 5, 2, reflect, 0});
  }
  compare({1, 66, 81, 256, true, 4, 3, 3, true, 0});
  compare({1, 1, 1, 2, true, 1, 7, 3, false, 0});
}

TEST(cuda_label_conv_poisons_windows_of_unknown_labels) {
  for (const int32_t pool_levels : {0, 2}) {
    Scene scene({1, 40, 80, 5, true, 4, 3, pool_levels, true, 0});
    scene.labels[20 * 80 + 40] = 5;
    std::vector<float> out(size(scene.layout.out_height * scene.layout.out_width * 4));
    std::vector<uint64_t> scratch(size(p2pfast::cuda::label_conv_scratch(scene.shape, nullptr, nullptr) / 8));
    LabelConvCall call{};
    call.shape = scene.shape;
    call.labels = scene.labels.data();
    call.label_bytes = 1;
    call.edges = scene.edges.data();
    call.packed = scene.packed.data();
    call.out = out.data();
    call.out_stride = 4;
    call.scratch = scratch.data();
    p2pfast::cuda::run_label_conv(call, Emulator{false});
    for (int64_t y = 0; y < scene.layout.out_height; ++y)
      for (int64_t x = 0; x < scene.layout.out_width; ++x) {
        const int64_t reach = pool_levels == 0 ? 1 : 2, scale = 1 << pool_levels;
        const float got = out[size((y * scene.layout.out_width + x) * 4)];
        const bool far = std::abs(y - 20 / scale) > reach || std::abs(x - 40 / scale) > reach;
        const bool at = y == 20 / scale && x == 40 / scale;
        CHECK(!far || std::abs(got / scene.expected(0, y, x, 0) - 1) <= 2e-6);
        CHECK(!at || std::isnan(got));
      }
  }
}

}  // namespace
