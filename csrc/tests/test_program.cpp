#include <cmath>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/program.h"
#include "testing.h"

namespace {

using p2pfast::Act;
using p2pfast::ConvAlgorithm;
using p2pfast::DType;
using p2pfast::slot_address;

constexpr int kSide = 9, kChannels = 16, kPixels = kSide * kSide;

template <class T>
T* at(int slot, int64_t floats) {
  return reinterpret_cast<T*>(slot_address(slot, static_cast<uint64_t>(floats) * sizeof(float)));
}
uint64_t address(const std::vector<float>& v) { return reinterpret_cast<uint64_t>(v.data()); }

p2pfast::Source source(const void* data) {
  return {data,    kPixels * kChannels, kSide * kChannels, kChannels, 1, DType::kFloat32, kChannels, nullptr,
          nullptr, kChannels,           Act::kNone,        0.0f};
}

// conv with statistics -> merge -> normalise and add the input: slot 0 is the input, 1 the output, 2 the
// weights and 3 the arena.
struct Chain {
  p2pfast::Program program;
  std::vector<float> weight, packed;
  int64_t parts = 0, arena = 0;

  Chain() : weight(size_t{kChannels * kChannels * 9}) {
    p2pfast::testing::Random random(5);
    for (float& w : weight) w = (random.uniform() - 0.5f) / 12;
    p2pfast::ConvArgs conv{};
    conv.source[0] = source(weight.data());  // any address: only sizes are asked for
    conv.sources = conv.images = 1;
    conv.height = conv.width = conv.out_height = conv.out_width = kSide;
    conv.out_channels = kChannels;
    conv.kernel_h = conv.kernel_w = 3;
    conv.stride = conv.pad_top = conv.pad_left = 1;
    conv.pad = p2pfast::Pad::kReflect;
    conv.weight = weight.data();
    conv.weight_out_stride = kChannels * 9;
    conv.weight_in_stride = 9;
    const p2pfast::ConvKernel& kernel = p2pfast::conv_kernel(ConvAlgorithm::kWinograd);
    packed.resize(static_cast<size_t>(kernel.packed_floats(conv)));
    kernel.pack(conv, packed.data());
    parts = kernel.partials(conv);
    const int64_t workspace = kernel.workspace_bytes(conv, p2pfast::num_threads()) / 4;
    const int64_t partial = workspace, count = partial + parts * 2 * kChannels,
                  scale = count + 16 * ((parts + 15) / 16);
    const int64_t middle = scale + 2 * kChannels;
    arena = middle + kPixels * kChannels;

    conv.source[0] = source(at<void>(0, 0));
    conv.weight = at<void>(2, 0);
    conv.packed = at<float>(2, 0);
    conv.workspace = at<void>(3, 0);
    conv.partial = at<float>(3, partial);
    conv.count = at<float>(3, count);
    conv.out = {at<void>(3, middle), kPixels * kChannels, kSide * kChannels, kChannels, 1, DType::kFloat32};
    program.add(p2pfast::ConvStep{conv, ConvAlgorithm::kWinograd});
    program.add(p2pfast::MergeArgs{conv.partial, conv.count, 1, kChannels, parts, false, 1e-5f, nullptr,
                                   nullptr, at<float>(3, scale), at<float>(3, scale + kChannels), nullptr,
                                   nullptr});
    p2pfast::ApplyArgs apply{};
    apply.first = source(at<void>(3, middle));
    apply.first.scale = at<float>(3, scale);
    apply.first.shift = at<float>(3, scale + kChannels);
    apply.second = source(at<void>(0, 0));
    apply.images = 1;
    apply.height = apply.width = kSide;
    apply.channels = kChannels;
    apply.out = {at<void>(1, 0), kPixels * kChannels, kSide * kChannels, kChannels, 1, DType::kFloat32};
    program.add(apply);
  }

  std::vector<float> run(const std::vector<float>& input) const {
    std::vector<float> out(input.size(), NAN), memory(static_cast<size_t>(arena + 16), NAN);
    const uint64_t aligned = (address(memory) + 63) / 64 * 64;
    std::vector<double> seconds;
    program.run({address(input), address(out), address(packed), aligned}, 0, program.size(), &seconds);
    CHECK(seconds.size() == 3);
    return out;
  }
};

std::vector<float> make_input(uint64_t seed) {
  p2pfast::testing::Random random(seed);
  std::vector<float> input(size_t{kPixels * kChannels});
  for (float& v : input) v = random.uniform() + 3;
  return input;
}

// out - input is normalised: mean 0, deviation 1 in every channel.
bool is_normalised(const std::vector<float>& input, const std::vector<float>& out) {
  for (size_t c = 0; c < kChannels; ++c) {
    double sum = 0, squares = 0;
    for (size_t p = 0; p < kPixels; ++p) {
      const double v = static_cast<double>(out[p * kChannels + c]) - input[p * kChannels + c];
      sum += v;
      squares += v * v;
    }
    if (!(std::abs(sum / kPixels) < 1e-4) || !(std::abs(squares / kPixels - 1) < 5e-2)) return false;
  }
  return true;
}

TEST(program_runs_a_chain_with_any_memory) {
  p2pfast::testing::at_every_level([](const char*) {
    const Chain chain;
    for (const uint64_t seed : {1u, 2u}) {
      const std::vector<float> input = make_input(seed);
      const std::vector<float> out = chain.run(input);
      CHECK(is_normalised(input, out));
      CHECK(out == chain.run(input));
    }
  });
}

TEST(program_from_several_threads) {
  const Chain chain;
  std::vector<std::vector<float>> inputs, expected, got(4);
  for (uint64_t i = 0; i < 4; ++i) inputs.push_back(make_input(i));
  for (const auto& input : inputs) expected.push_back(chain.run(input));
  std::vector<std::thread> callers;
  const int threads = p2pfast::num_threads();
  for (size_t i = 0; i < 4; ++i) {
    callers.emplace_back([&, i] {
      p2pfast::set_num_threads(threads);
      for (int repeat = 0; repeat < 5; ++repeat) got[i] = chain.run(inputs[i]);
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(got == expected);
}

TEST(program_checks_ranges_and_slots) {
  const Chain chain;
  const std::vector<uint64_t> none;
  CHECK_THROWS(chain.program.run(none, 0, 1, nullptr), std::invalid_argument, "not bound");
  CHECK_THROWS(chain.program.run(none, 3, 4, nullptr), std::out_of_range, "");
  CHECK_THROWS(chain.program.run(none, -1, 1, nullptr), std::out_of_range, "");
  chain.program.run(none, 2, 2, nullptr);
}

}  // namespace
