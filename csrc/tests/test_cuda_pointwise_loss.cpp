// The CUDA kernels on the host, against the CPU's.
#include <cmath>
#include <vector>

#include "cpu/pointwise_loss.h"
#include "cuda/pointwise_loss_kernel.h"
#include "emulate.h"
#include "testing.h"

namespace {

using p2pfast::Loss;
using p2pfast::LossPart;
using p2pfast::ValueType;
using p2pfast::cuda::narrow;
using p2pfast::cuda::widened;

struct Emulator {
  bool backwards;
  int launches = 0;
  template <class Kernel>
  void operator()(const typename Kernel::Args& args, int64_t blocks) {
    ++launches;
    p2pfast::testing::emulate<Kernel>(args, blocks, backwards);
  }
};

// Values of one tensor in its type, with room for an address that is not aligned.
struct Values {
  ValueType type;
  size_t offset, count;
  alignas(16) std::vector<uint32_t> words;

  Values(ValueType t, size_t n, bool aligned)
      : type(t), offset(aligned ? 0 : 1), count(n), words(n + 8, ~0u) {}
  size_t bytes() const { return type == ValueType::kFloat32 ? 4 : 2; }
  void* data() { return reinterpret_cast<uint8_t*>(words.data()) + offset * bytes(); }
  void set(size_t i, float v) {
    void* const p = static_cast<uint8_t*>(data()) + i * bytes();
    if (type == ValueType::kFloat32) narrow(v, static_cast<float*>(p));
    if (type == ValueType::kBFloat16) narrow(v, static_cast<p2pfast::cuda::BFloat16*>(p));
    if (type == ValueType::kFloat16) narrow(v, static_cast<p2pfast::cuda::Float16*>(p));
  }
  float get(size_t i) {
    const void* const p = static_cast<uint8_t*>(data()) + i * bytes();
    if (type == ValueType::kFloat32) return *static_cast<const float*>(p);
    if (type == ValueType::kBFloat16) return widened(*static_cast<const p2pfast::cuda::BFloat16*>(p));
    return widened(*static_cast<const p2pfast::cuda::Float16*>(p));
  }
};

void compare(Loss loss, float target, const std::vector<size_t>& counts, bool gradient, float spread) {
  p2pfast::testing::Random random(static_cast<uint64_t>(loss) * 100 + counts.size());
  std::vector<Values> a, b, wanted, got;
  std::vector<LossPart> parts, cpu_parts;
  for (size_t p = 0; p < counts.size(); ++p) {
    const auto type = static_cast<ValueType>(p % 3);
    const bool aligned = p % 4 != 1;
    const size_t n = counts[p];
    a.emplace_back(type, n, aligned);
    b.emplace_back(p % 5 == 0 ? ValueType::kFloat32 : type, n, aligned);
    wanted.emplace_back(type, n, aligned);
    got.emplace_back(type, n, aligned);
    for (size_t i = 0; i < n; ++i) {
      a[p].set(i, spread * (random.uniform() - 0.4f));
      b[p].set(i, random.below(10) == 0 ? a[p].get(i) : spread * (random.uniform() - 0.6f));
    }
  }
  for (size_t p = 0; p < counts.size(); ++p) {
    parts.push_back({a[p].data(), b[p].data(), gradient ? got[p].data() : nullptr,
                     static_cast<int64_t>(counts[p]), a[p].type, b[p].type, 0.5f / static_cast<float>(p + 1),
                     2.0f, 0});
    cpu_parts.push_back(parts.back());
    if (gradient) cpu_parts.back().gradient = wanted[p].data();
  }
  const double expected = p2pfast::pointwise_loss(loss, target, cpu_parts);
  int64_t chunks = 0;
  for (const size_t n : counts)
    chunks += p2pfast::cuda::ceil_div(static_cast<int64_t>(n), p2pfast::kLossChunk);
  float results[2] = {NAN, NAN};
  for (const bool backwards : {false, true}) {
    std::vector<double> sums(static_cast<size_t>(chunks), NAN);
    Emulator emulator{backwards};
    p2pfast::cuda::run_pointwise_loss(loss, target, parts, sums.data(), &results[backwards ? 1 : 0],
                                      emulator);
    CHECK(emulator.launches == static_cast<int>((counts.size() + 63) / 64) + 1);
  }
  CHECK(results[0] == results[1]);
  CHECK(std::abs(results[0] - expected) <= 2e-7 * std::abs(expected) + 1e-7);
  if (!gradient) return;
  bool same = true, untouched = true;
  for (size_t p = 0; p < counts.size(); ++p) {
    const float step = a[p].type == ValueType::kFloat32    ? 3e-7f
                       : a[p].type == ValueType::kBFloat16 ? 0x1p-7f
                                                           : 0x1p-10f;
    for (size_t i = 0; i < counts[p]; ++i) {
      const float x = wanted[p].get(i), y = got[p].get(i);
      same = same && std::abs(x - y) <= step * std::abs(x) + 1e-7f;
    }
    untouched = untouched && std::isnan(got[p].get(counts[p]));
  }
  CHECK(same);
  CHECK(untouched);
}

TEST(cuda_pointwise_loss_matches_the_cpu) {
  const std::vector<size_t> sizes = {1, 7, 8, 1000, 8192, 8200, 40001, 3, 16385};
  for (int loss = 0; loss < p2pfast::kLosses; ++loss)
    for (const float target : {1.0f, 0.0f, 0.9f})
      for (const bool gradient : {false, true})
        compare(static_cast<Loss>(loss), target, sizes, gradient, loss == 0 ? 60.0f : 6.0f);
}

TEST(cuda_pointwise_loss_takes_many_parts) {
  compare(Loss::kAbsoluteDifference, 0.0f, std::vector<size_t>(64, 33), true, 3.0f);
  compare(Loss::kSquare, 0.5f, std::vector<size_t>(150, 9), true, 3.0f);
}

TEST(cuda_pointwise_loss_keeps_nan_and_infinity) {
  for (int loss = 0; loss < p2pfast::kLosses; ++loss) {
    float a[3] = {1.0f, NAN, INFINITY}, b[3] = {0.5f, 0.5f, 0.5f}, gradient[3], out = 0;
    double sums[1];
    const std::vector<LossPart> parts = {
        {a, b, gradient, 3, ValueType::kFloat32, ValueType::kFloat32, 1.0f, 1.0f, 0}};
    Emulator emulator{false};
    p2pfast::cuda::run_pointwise_loss(static_cast<Loss>(loss), 1.0f, parts, sums, &out, emulator);
    CHECK(std::isnan(out));
    CHECK(static_cast<Loss>(loss) == Loss::kLinear || std::isnan(gradient[1]));
    CHECK(!std::isnan(gradient[0]));
  }
}

TEST(cuda_pointwise_scale_multiplies_and_rounds_once) {
  p2pfast::testing::Random random(8);
  const float factor = 0.3f;
  for (const size_t parts : {1, 70}) {
    std::vector<Values> from, to;
    std::vector<p2pfast::cuda::ScalePart> list;
    for (size_t p = 0; p < parts; ++p) {
      const auto type = static_cast<ValueType>(p % 3);
      const size_t n = parts == 1 ? 20001 : 1 + 5 * p;
      from.emplace_back(type, n, p % 4 != 1);
      to.emplace_back(type, n, p % 4 != 1);
      for (size_t i = 0; i < n; ++i) from[p].set(i, random.uniform() - 0.5f);
    }
    for (size_t p = 0; p < parts; ++p)
      list.push_back({from[p].data(), to[p].data(), static_cast<int64_t>(from[p].count),
                      1.0f / static_cast<float>(p + 1), from[p].type});
    Emulator emulator{false};
    p2pfast::cuda::run_pointwise_scale(list, &factor, emulator);
    CHECK(emulator.launches == (parts == 1 ? 1 : 2));
    bool same = true;
    for (size_t p = 0; p < parts; ++p) {
      Values expected(from[p].type, 1, true);
      for (size_t i = 0; i < from[p].count; ++i) {
        expected.set(0, from[p].get(i) * (factor * list[p].factor));
        same = same && to[p].get(i) == expected.get(0);
      }
      CHECK(std::isnan(to[p].get(to[p].count)));
    }
    CHECK(same);
  }
}

}  // namespace
