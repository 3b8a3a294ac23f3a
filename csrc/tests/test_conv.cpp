#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/parallel.h"
#include "cpu/program.h"
#include "testing.h"

namespace {

using p2pfast::Act;
using p2pfast::ConvAlgorithm;
using p2pfast::ConvArgs;
using p2pfast::ConvKernel;
using p2pfast::DType;
using p2pfast::Packed;
using p2pfast::Pad;

struct Shape {
  int images, height, width, channels, second, out_channels, kernel, stride, pad;
  bool transposed = false;
  int output_padding = 0;
  Pad mode = Pad::kZero;
  int block = 0, group = 0;
  bool constant = false;  // one value for all pixels of an image and channel
  bool turned = false;    // kernels lie turned by 180 degrees
};

int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }
uint16_t to_bf16(float v) { return static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16); }
float from_bf16(uint16_t v) { return std::bit_cast<float>(static_cast<uint32_t>(v) << 16); }

// One input: NHWC with padding lanes, or NCHW; float32 or bfloat16. Every vector holds exactly what may
// be touched, so that AddressSanitizer sees an element too many.
struct Input {
  int channels;
  bool planes;
  std::vector<float> values, scale, shift;
  std::vector<uint16_t> halves;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;

  Input(const Shape& s, int count, bool nchw, bool half, p2pfast::testing::Random& random)
      : channels(count), planes(nchw) {
    const int64_t room = nchw ? count : padded(count);
    channel_stride = nchw ? static_cast<int64_t>(s.height) * s.width : 1;
    pixel_stride = nchw ? 1 : room;
    row_stride = s.width * pixel_stride;
    image_stride = s.height * s.width * room;
    values.assign(static_cast<size_t>(s.images * image_stride), NAN);  // and so padding lanes stay
    scale.assign(static_cast<size_t>(s.images * padded(count)), NAN);
    shift = scale;
    for (int n = 0; n < s.images; ++n) {
      for (int c = 0; c < count; ++c) {
        scale[static_cast<size_t>(n * padded(count) + c)] = random.uniform() + 0.5f;
        shift[static_cast<size_t>(n * padded(count) + c)] = random.uniform() - 0.5f;
        for (int y = 0; y < s.height; ++y)
          for (int x = 0; x < s.width; ++x)
            at(n, y, x, c) =
                s.constant && y + x > 0 ? at(n, 0, 0, c) : from_bf16(to_bf16(random.uniform() - 0.3f));
      }
    }
    if (half)
      for (const float v : values) halves.push_back(to_bf16(v));
  }
  float& at(int64_t n, int64_t y, int64_t x, int64_t c) {
    return values[static_cast<size_t>(n * image_stride + y * row_stride + x * pixel_stride +
                                      c * channel_stride)];
  }
  double used(int64_t n, int64_t y, int64_t x, int64_t c) {
    const size_t i = static_cast<size_t>(n * padded(channels) + c);
    const double v = static_cast<double>(at(n, y, x, c)) * scale[i] + shift[i];
    return v < 0 ? v * 0.25 : v;
  }
  p2pfast::Source source() const {
    const bool half = !halves.empty();
    const void* data = half ? static_cast<const void*>(halves.data()) : values.data();
    return {data,           image_stride,
            row_stride,     pixel_stride,
            channel_stride, half ? DType::kBFloat16 : DType::kFloat32,
            channels,       scale.data(),
            shift.data(),   padded(channels),
            Act::kLeaky,    0.25f};
  }
};

int64_t index(int64_t i, int64_t size, Pad mode) {
  if (i >= 0 && i < size) return i;
  if (mode == Pad::kZero) return -1;
  if (mode == Pad::kReplicate) return i < 0 ? 0 : size - 1;
  return i < 0 ? -i : 2 * size - 2 - i;
}

struct Problem {
  Shape shape;
  std::vector<Input> inputs;
  std::vector<float> weight, bias;
  std::vector<uint16_t> half_weight;
  int out_height, out_width;
  ConvArgs args{};

  Problem(const Shape& s, bool nchw, bool half) : shape(s) {
    p2pfast::testing::Random random(static_cast<uint64_t>(s.height * 100 + s.width));
    inputs.emplace_back(s, s.channels, nchw, half, random);
    if (s.second > 0) inputs.emplace_back(s, s.second, nchw, half, random);
    const int total = s.channels + s.second, taps = s.kernel * s.kernel;
    for (int i = 0; i < total * s.out_channels * taps; ++i)
      weight.push_back(from_bf16(to_bf16((random.uniform() - 0.5f) / static_cast<float>(total * taps))));
    if (half)
      for (const float w : weight) half_weight.push_back(to_bf16(w));
    for (int i = 0; i < s.out_channels; ++i) bias.push_back(random.uniform() + 2);
    const auto side = [&](int size) {
      return s.transposed ? (size - 1) * s.stride - 2 * s.pad + s.kernel + s.output_padding
                          : (size + 2 * s.pad - s.kernel) / s.stride + 1;
    };
    out_height = side(s.height);
    out_width = side(s.width);
    for (size_t i = 0; i < inputs.size(); ++i) args.source[i] = inputs[i].source();
    args.sources = static_cast<int32_t>(inputs.size());
    args.images = s.images;
    args.height = s.height;
    args.width = s.width;
    args.out_height = out_height;
    args.out_width = out_width;
    args.out_channels = s.out_channels;
    args.kernel_h = args.kernel_w = s.kernel;
    args.stride = s.stride;
    args.pad_top = args.pad_left = s.pad;
    args.transposed = s.transposed;
    args.pad = s.mode;
    args.weight = half ? static_cast<const void*>(half_weight.data()) : weight.data();
    args.weight_dtype = half ? DType::kBFloat16 : DType::kFloat32;
    args.weight_out_stride = s.transposed ? taps : taps * total;
    args.weight_in_stride = s.transposed ? taps * s.out_channels : taps;
    args.weight_turned = s.turned;
    args.bias = bias.data();
    args.act = Act::kNone;
    args.block = s.block;
    args.group = s.group;
    p2pfast::check(args);
  }

  // Adds the contribution of input pixel (y, x) through tap (ky, kx) to sum[out channel].
  void add(int64_t n, int64_t y, int64_t x, int ky, int kx, std::vector<double>& sum) {
    int64_t channel = 0;
    const int tap = ky * shape.kernel + kx, taps = shape.kernel * shape.kernel;
    for (Input& input : inputs) {
      for (int c = 0; c < input.channels; ++c, ++channel) {
        const double v = input.used(n, y, x, c);
        for (int o = 0; o < shape.out_channels; ++o)
          sum[static_cast<size_t>(o)] +=
              v * weight[static_cast<size_t>(o * args.weight_out_stride + channel * args.weight_in_stride +
                                             (shape.turned ? taps - 1 - tap : tap))];
      }
    }
  }
  std::vector<double> expected(int64_t n, int64_t oy, int64_t ox) {
    std::vector<double> sum(bias.begin(), bias.end());
    for (int ky = 0; ky < shape.kernel; ++ky) {
      for (int kx = 0; kx < shape.kernel; ++kx) {
        int64_t y = oy * shape.stride - shape.pad + ky, x = ox * shape.stride - shape.pad + kx;
        if (shape.transposed) {
          y = oy + shape.pad - ky;
          x = ox + shape.pad - kx;
          if (y < 0 || x < 0 || y % shape.stride != 0 || x % shape.stride != 0) continue;
          y /= shape.stride;
          x /= shape.stride;
        }
        y = index(y, shape.height, shape.mode);
        x = index(x, shape.width, shape.mode);
        if (y >= 0 && x >= 0 && y < shape.height && x < shape.width) add(n, y, x, ky, kx, sum);
      }
    }
    return sum;
  }
};

// Mean and M2 of one image and channel, from the parts.
void check_statistics(const Problem& p, const std::vector<float>& partial, const std::vector<float>& count,
                      int64_t parts, int64_t n, int c, const std::vector<double>& values) {
  const int64_t stride = padded(p.shape.out_channels);
  double total = 0, mean = 0, m2 = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const double size = count[static_cast<size_t>(n * parts + part)];
    if (size == 0) continue;
    const size_t at = static_cast<size_t>((n * parts + part) * 2 * stride + c);
    const double delta = partial[at] - mean;
    m2 += partial[at + static_cast<size_t>(stride)] + delta * delta * total * size / (total + size);
    total += size;
    mean += delta * size / total;
  }
  double exact = 0, exact_m2 = 0;
  for (const double v : values) exact += v / static_cast<double>(values.size());
  for (const double v : values) exact_m2 += (v - exact) * (v - exact);
  CHECK(total == static_cast<double>(values.size()));
  CHECK(std::abs(mean - exact) < 1e-5);
  CHECK(std::abs(m2 - exact_m2) < 1e-3 * exact_m2 + 1e-8);
}

enum class Layout { kPadded, kDense, kPlanes };

void compare(ConvAlgorithm algorithm, const Shape& shape, bool nchw, bool half, Layout layout,
             Packed packed_dtype = Packed::kFloat32) {
  Problem p(shape, nchw, half);
  ConvArgs& args = p.args;
  const bool narrow = packed_dtype != Packed::kFloat32;
  args.packed_dtype = packed_dtype;
  const ConvKernel& kernel = p2pfast::conv_kernel(algorithm);
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t room = layout == Layout::kPadded ? padded(shape.out_channels) : shape.out_channels;
  std::vector<float> out(static_cast<size_t>(shape.images * pixels * room), NAN);
  std::vector<uint16_t> half_out(half ? out.size() : 0, 0xffff);
  const bool planes = layout == Layout::kPlanes;
  args.out = {half ? static_cast<void*>(half_out.data()) : out.data(),
              pixels * room,
              planes ? p.out_width : p.out_width * room,
              planes ? 1 : room,
              planes ? pixels : 1,
              half ? DType::kBFloat16 : DType::kFloat32};
  if (kernel.refuses(args) != nullptr) return;
  // A constant input is one label; the packed Winograd algorithms then copy tiles.
  const auto map = [&](int64_t height, int64_t width) {
    return std::vector<uint8_t>(static_cast<size_t>(shape.images * height * width), 3);
  };
  std::vector<uint8_t> uniform = map(shape.height, shape.width), out_uniform = map(p.out_height, p.out_width);
  if (shape.constant) {
    args.uniform = uniform.data();
    args.out_uniform = out_uniform.data();
  }
  std::vector<float> packed(static_cast<size_t>(kernel.packed_floats(args)), NAN);
  // Workspaces are aligned to 64 bytes.
  const int64_t bytes = kernel.workspace_bytes(args, p2pfast::num_threads());
  std::vector<unsigned char> workspace(static_cast<size_t>(bytes + 64), 255);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data());
  const size_t skip = static_cast<size_t>((64 - address % 64) % 64);
  std::vector<float> partial, count;
  const int64_t parts = kernel.partials(args);
  if (algorithm != ConvAlgorithm::kThin) {
    partial.assign(static_cast<size_t>(shape.images * parts * 2 * padded(shape.out_channels)), NAN);
    count.assign(static_cast<size_t>(shape.images * parts), NAN);
    args.partial = partial.data();
    args.count = count.data();
  }
  kernel.pack(args, packed.data());
  args.packed = packed.data();
  args.workspace = workspace.data() + skip;
  p2pfast::run_step(p2pfast::ConvStep{args, algorithm});
  for (size_t i = 0; i < skip; ++i) CHECK(workspace[i] == 255);
  for (size_t i = static_cast<size_t>(bytes) + skip; i < workspace.size(); ++i) CHECK(workspace[i] == 255);

  bool same = true;
  for (int64_t n = 0; n < shape.images; ++n) {
    std::vector<std::vector<double>> values(static_cast<size_t>(shape.out_channels));
    for (int64_t i = 0; i < pixels; ++i) {
      const std::vector<double> expected = p.expected(n, i / p.out_width, i % p.out_width);
      for (int c = 0; c < shape.out_channels; ++c) {
        const size_t at = static_cast<size_t>(n * args.out.image_stride + i * args.out.pixel_stride +
                                              c * args.out.channel_stride);
        const double v = expected[static_cast<size_t>(c)];
        values[static_cast<size_t>(c)].push_back(v);
        const double got = half ? from_bf16(half_out[at]) : out[at];
        same = same && std::abs(got - v) < (narrow ? 0.05 : half ? 0.02 : 2e-5);
      }
    }
    if (!partial.empty() && !narrow)
      for (int c = 0; c < shape.out_channels; ++c)
        check_statistics(p, partial, count, parts, n, c, values[static_cast<size_t>(c)]);
  }
  CHECK(same);
}

const Shape kShapes[] = {
    {2, 9, 7, 5, 0, 7, 3, 1, 1, false, 0, Pad::kReflect},
    {1, 6, 70, 17, 0, 20, 3, 1, 1, false, 0, Pad::kReplicate},
    {2, 5, 6, 6, 11, 35, 3, 1, 1, false, 0, Pad::kZero, 7, 16},
    {1, 3, 4, 300, 0, 17, 3, 1, 1},
    {1, 4, 4, 3, 0, 270, 3, 1, 1, false, 0, Pad::kZero, 0, 64},
    {1, 1, 1, 1, 0, 1, 3, 1, 1},
    {2, 9, 8, 5, 3, 18, 3, 2, 1, false, 0, Pad::kReflect},
    {1, 7, 10, 9, 0, 5, 4, 2, 1, false, 0, Pad::kReplicate, 8, 0},
    {1, 2, 2, 16, 0, 16, 4, 2, 1},
    {2, 4, 5, 7, 9, 6, 3, 2, 1, true, 1, Pad::kZero, 9, 0},
    {1, 5, 3, 20, 0, 3, 3, 2, 1, true},
    {2, 3, 6, 18, 0, 3, 4, 2, 1, true},
    {1, 1, 1, 33, 0, 17, 4, 2, 1, true},
    {1, 4, 3, 3, 0, 4, 2, 3, 0, true, 2},
    {1, 5, 5, 4, 0, 3, 5, 1, 2, true},
    {1, 8, 51, 6, 0, 3, 7, 1, 3, false, 0, Pad::kReflect},
    {1, 5, 131, 3, 2, 4, 3, 1, 0},
    {1, 13, 9, 3, 0, 5, 5, 3, 2, false, 0, Pad::kReflect, 64, 0},
    {1, 16, 17, 2, 0, 2, 16, 1, 0},
    {2, 9, 7, 34, 0, 1, 4, 1, 1},
    {1, 7, 10, 5, 9, 2, 5, 1, 2, false, 0, Pad::kReplicate},
    {1, 34, 4, 2, 0, 3, 7, 1, 3},
};

TEST(conv_matches_naive) {
  p2pfast::testing::at_every_level([](const char*) {
    for (const Shape& shape : kShapes) {
      for (int a = 0; a < p2pfast::kConvAlgorithms; ++a) {
        const auto algorithm = static_cast<ConvAlgorithm>(a);
        p2pfast::set_num_threads(1 + a % 3);
        compare(algorithm, shape, false, false, Layout::kPadded);
        compare(algorithm, shape, true, true, Layout::kDense);
        compare(algorithm, shape, false, true, Layout::kPlanes);
        Shape turned = shape;
        turned.turned = true;
        compare(algorithm, turned, false, false, Layout::kPadded);
        if (a == 5) continue;
        for (const Packed packed : {Packed::kBFloat16, Packed::kPairs})
          compare(algorithm, shape, false, true, Layout::kPadded, packed);
      }
    }
  });
  p2pfast::set_num_threads(2);
}

// The numbers of a shape, mostly small, that may or may not go together.
Shape random_shape(p2pfast::testing::Random& random) {
  const auto pick = [&](int low, int high) { return low + static_cast<int>(random.below(high - low + 1)); };
  Shape s{};
  s.images = pick(1, 2);
  s.height = pick(1, 14);
  s.width = random.below(8) == 0 ? pick(60, 140) : pick(1, 14);
  s.channels = pick(1, 24);
  s.second = random.below(4) == 0 ? pick(1, 20) : 0;
  s.out_channels = random.below(2) == 0 ? pick(1, 4) : pick(1, 40);
  const int common[] = {3, 3, 3, 4, 4, 7, pick(1, 9)};
  s.kernel = common[random.below(7)];
  s.stride = pick(1, 3);
  s.pad = pick(0, s.kernel / 2 + 1);
  s.transposed = random.below(3) == 0;
  s.output_padding = s.transposed && s.stride > 1 ? pick(0, 1) : 0;
  s.mode = s.transposed ? Pad::kZero : static_cast<Pad>(random.below(3));
  s.block = random.below(2) == 0 ? pick(0, 40) : 0;
  s.group = random.below(2) == 0 ? pick(0, 64) : 0;
  s.constant = s.second == 0 && random.below(3) == 0;
  return s;
}

bool runs(const Shape& shape) {
  try {
    const Problem problem(shape, false, false);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

TEST(conv_random_shapes) {
  p2pfast::testing::at_every_level([](const char*) {
    p2pfast::testing::Random random(11);
    int ran = 0;
    for (int i = 0; i < 120; ++i) {
      const Shape shape = random_shape(random);
      if (!runs(shape)) continue;
      ++ran;
      const auto layout = static_cast<Layout>(random.below(3));
      const bool nchw = random.below(4) == 0, half = random.below(2) == 0;
      const auto packed = static_cast<Packed>(random.below(3));
      for (int a = 0; a < p2pfast::kConvAlgorithms; ++a)
        compare(static_cast<ConvAlgorithm>(a), shape, nchw, half, layout, packed);
    }
    CHECK(ran > 50);
  });
}

// Whatever the numbers are, they are refused or have sizes.
TEST(conv_random_arguments) {
  p2pfast::testing::Random random(12);
  Problem problem({1, 8, 8, 4, 0, 4, 3, 1, 1}, false, false);
  const int32_t values[] = {-2147483647 - 1, -1, 0, 1, 2, 3, 7, 8, 9, 16, 17, 1000, 1 << 24, 2147483647};
  int refused = 0, accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    ConvArgs args = problem.args;
    int32_t* const fields[] = {&args.images,
                               &args.height,
                               &args.width,
                               &args.out_height,
                               &args.out_width,
                               &args.out_channels,
                               &args.kernel_h,
                               &args.kernel_w,
                               &args.stride,
                               &args.pad_top,
                               &args.pad_left,
                               &args.sources,
                               &args.block,
                               &args.group,
                               &args.source[0].channels,
                               &args.source[1].channels};
    args.transposed = random.below(3) == 0;
    args.pad = static_cast<Pad>(random.below(3));
    for (int64_t changes = random.below(4); changes >= 0; --changes)
      *fields[random.below(16)] = values[random.below(14)];
    try {
      p2pfast::check(args);
    } catch (const std::invalid_argument& error) {
      ++refused;
      CHECK(std::strlen(error.what()) > 10);
      continue;
    }
    ++accepted;
    for (int a = 0; a < p2pfast::kConvAlgorithms; ++a) {
      const ConvKernel& kernel = p2pfast::conv_kernel(static_cast<ConvAlgorithm>(a));
      if (kernel.refuses(args) != nullptr) continue;
      CHECK(kernel.packed_floats(args) >= 0);
      CHECK(kernel.workspace_bytes(args, 2) > 0);
      CHECK(kernel.partials(args) > 0);
    }
  }
  CHECK(refused > 1000 && accepted > 1000);
}

TEST(conv_checks_its_arguments) {
  const Problem good({1, 8, 8, 4, 0, 4, 3, 1, 1}, false, false);
  const auto with = [&](auto change) {
    ConvArgs args = good.args;
    change(args);
    return args;
  };
  using Bad = std::invalid_argument;
  CHECK_THROWS(p2pfast::check(with([](auto& a) { a.sources = 3; })), Bad, "sources is 3");
  CHECK_THROWS(p2pfast::check(with([](auto& a) { a.images = 0; })), Bad, "images is 0");
  CHECK_THROWS(p2pfast::check(with([](auto& a) { a.width = -1; })), Bad, "width is -1");
  CHECK_THROWS(p2pfast::check(with([](auto& a) { a.source[0].channels = 0; })), Bad, "channels is 0");
  CHECK_THROWS(p2pfast::check(with([](auto& a) { a.stride = 0; })), Bad, "stride is 0");
  CHECK_THROWS(p2pfast::check(with([](auto& a) { a.out_width = 10; })), Bad, "out_width is 10");
  CHECK_THROWS(p2pfast::check(with([](auto& a) {
                 a.pad = Pad::kReflect;
                 a.pad_top = 8;
               })),
               Bad, "padding is 8");
  CHECK_THROWS(p2pfast::check(with([](auto& a) {
                 a.transposed = true;
                 a.out_height = 10;
               })),
               Bad, "out_height is 10");
}

}  // namespace
