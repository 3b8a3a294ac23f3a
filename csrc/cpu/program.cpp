#include "cpu/program.h"

#include <chrono>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace p2pfast {
namespace {

void require(bool ok, const char* name, int64_t value, const char* rule) {
  if (!ok) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; " + rule);
}

void require_positive(const char* name, int64_t value) {
  require(value > 0, name, value, "it must be positive");
}

void require_address(const char* name, const void* address) {
  if (address == nullptr) throw std::invalid_argument(std::string(name) + " has no address");
}

void check_source(const Source& source, int images, int height, int width) {
  require_positive("images", images);
  require_positive("height", height);
  require_positive("width", width);
  require_positive("channels", source.channels);
  require_address("data", source.data);
}

struct Binder {
  const std::vector<uint64_t>& slots;

  template <class T>
  void operator()(T*& pointer) const {
    const auto address = reinterpret_cast<uint64_t>(pointer);
    const uint64_t slot = address >> 48;
    if (slot == 0) return;
    const uint64_t base = slot <= slots.size() ? slots[slot - 1] : 0;
    if (base == 0) throw std::invalid_argument("slot " + std::to_string(slot - 1) + " is used but not bound");
    pointer = reinterpret_cast<T*>(base + (address & 0xffffffffffffull));
  }
  void operator()(Source& source) const {
    (*this)(source.data);
    (*this)(source.scale);
    (*this)(source.shift);
  }
};

void bind(ConvArgs& a, const Binder& to) {
  for (Source& source : a.source) to(source);
  to(a.weight);
  to(a.packed);
  to(a.bias);
  to(a.out.data);
  to(a.partial);
  to(a.count);
  to(a.workspace);
  to(a.uniform);
  to(a.out_uniform);
}
void bind(ConvStep& step, const Binder& to) { bind(step.args, to); }
void bind(PackStep& step, const Binder& to) {
  bind(step.args, to);
  to(step.packed);
}
void bind(WeightGradientStep& step, const Binder& to) {
  bind(step.args.conv, to);
  to(step.args.grad);
  to(step.args.out);
  to(step.args.workspace);
}
void bind(DataGradientArgs& a, const Binder& to) {
  bind(a.conv, to);
  to(a.grad);
  to(a.out.data);
  to(a.workspace);
}
void bind(StatisticsArgs& a, const Binder& to) {
  to(a.source);
  to(a.partial);
  to(a.count);
}
void bind(MergeArgs& a, const Binder& to) {
  to(a.partial);
  to(a.count);
  to(a.weight);
  to(a.bias);
  to(a.scale);
  to(a.shift);
  to(a.mean);
  to(a.variance);
}
void bind(ApplyArgs& a, const Binder& to) {
  to(a.first);
  to(a.second);
  to(a.noise);
  to(a.out.data);
}
void bind(PoolArgs& a, const Binder& to) {
  to(a.source);
  to(a.out.data);
}
void bind(LabelConvArgs& a, const Binder& to) {
  to(a.labels);
  to(a.edges);
  to(a.packed);
  to(a.out);
  to(a.partials);
  to(a.uniform);
  to(a.scratch);
}
void bind(InstanceEdges& a, const Binder& to) {
  to(a.ids);
  to(a.edges);
}

void run(const ConvStep& step) { conv_kernel(step.algorithm).run(step.args); }
void run(const PackStep& step) { conv_kernel(step.algorithm).pack(step.args, step.packed); }
void run(const WeightGradientStep& step) { weight_gradient_kernel(step.algorithm).run(step.args); }
void run(const DataGradientArgs& args) { data_gradient().run(args); }
void run(const StatisticsArgs& args) { norm_kernels().statistics(args); }
void run(const MergeArgs& args) { norm_kernels().merge(args); }
void run(const ApplyArgs& args) { norm_kernels().apply(args); }
void run(const PoolArgs& args) { norm_kernels().avg_pool(args); }
void run(const LabelConvArgs& args) { label_conv().run(args); }
void run(const InstanceEdges& args) { instance_edges(args); }

}  // namespace

void check(const ConvArgs& a) {
  require(a.sources == 1 || a.sources == 2, "sources", a.sources, "1 or 2 are supported");
  constexpr int64_t kMost = 1 << 24;  // of any size: products of a few of them stay within 64 bits
  for (int i = 0; i < a.sources; ++i)
    require(a.source[i].channels > 0 && a.source[i].channels < kMost, "channels", a.source[i].channels,
            "it must be positive and below 2^24");
  for (const int64_t size : {a.height, a.width, a.out_height, a.out_width, a.out_channels, a.kernel_h,
                             a.kernel_w, a.stride, a.pad_top, a.pad_left})
    require(size < kMost, "a size", size, "it must be below 2^24");
  require(a.images > 0, "images", a.images, "an empty batch has no convolution");
  require(a.height > 0, "height", a.height, "it must be positive");
  require(a.width > 0, "width", a.width, "it must be positive");
  require(a.out_channels > 0, "out_channels", a.out_channels, "it must be positive");
  require(a.kernel_h > 0 && a.kernel_w > 0, "kernel", a.kernel_h, "it must be positive");
  require(a.stride > 0, "stride", a.stride, "it must be positive");
  require(a.pad_top >= 0 && a.pad_left >= 0, "padding", a.pad_top, "it must not be negative");
  require(a.out_height > 0, "out_height", a.out_height, "the kernel does not fit the padded input");
  require(a.out_width > 0, "out_width", a.out_width, "the kernel does not fit the padded input");
  if (a.pad == Pad::kReflect) {
    require(a.pad_top < a.height, "padding", a.pad_top, "reflection needs it below the input's height");
    require(a.pad_left < a.width, "padding", a.pad_left, "reflection needs it below the input's width");
  }
  if (a.transposed) {
    require(a.pad == Pad::kZero, "pad", static_cast<int>(a.pad), "transposed convolutions pad with zeros");
    require(a.pad_top < a.kernel_h, "padding", a.pad_top, "it must be below the transposed kernel's size");
    for (const bool rows : {true, false}) {
      const int64_t input = rows ? a.height : a.width, kernel = rows ? a.kernel_h : a.kernel_w;
      const int64_t reach = (input - 1) * a.stride - 2 * (rows ? a.pad_top : a.pad_left) + kernel;
      const int64_t out = rows ? a.out_height : a.out_width;
      // A band of the output has fewer rows than the input gives, and at the lower border any padding.
      const int64_t slack = rows ? a.pad_top : 0;
      require((rows || out >= reach) && out < reach + slack + a.stride, rows ? "out_height" : "out_width",
              out, "it does not follow from the input, stride, padding and kernel");
    }
  } else {
    const int64_t last_row = static_cast<int64_t>(a.out_height - 1) * a.stride - a.pad_top + a.kernel_h - 1;
    // A band at the lower border has the image's padding below, whatever it has above.
    const int64_t below = a.pad_top < a.kernel_h ? a.kernel_h - 1 : a.pad_top;
    require(last_row < a.height + below + a.stride, "out_height", a.out_height,
            "it reaches past the padded input");
    const int64_t last_column =
        static_cast<int64_t>(a.out_width - 1) * a.stride - a.pad_left + a.kernel_w - 1;
    require(last_column < a.width + a.pad_left + a.stride, "out_width", a.out_width,
            "it reaches past the padded input");
  }
}

void check(const StatisticsArgs& a) {
  check_source(a.source, a.images, a.height, a.width);
  require_address("partial", a.partial);
  require_address("count", a.count);
}

void check(const MergeArgs& a) {
  require_positive("images", a.images);
  require_positive("channels", a.channels);
  require_positive("parts", a.parts);
  if (!(a.eps >= 0.0f)) throw std::invalid_argument("eps must not be negative");
  require_address("partial", a.partial);
  require_address("count", a.count);
  require_address("scale", a.scale);
  require_address("shift", a.shift);
}

void check(const ApplyArgs& a) {
  check_source(a.first, a.images, a.height, a.width);
  require_address("out", a.out.data);
  if (a.second.data == nullptr) return;
  require(a.second.channels == a.channels, "channels", a.second.channels,
          "both sources need the same number");
}

void check(const PoolArgs& a) {
  check_source(a.source, a.images, a.height, a.width);
  require_address("out", a.out.data);
  require_positive("kernel", a.kernel);
  require_positive("stride", a.stride);
  require(a.pad >= 0 && 2 * a.pad <= a.kernel, "pad", a.pad, "it must be from 0 to half the kernel");
  require_positive("out_height", a.out_height);
  require_positive("out_width", a.out_width);
  require(a.pad_top >= 0 && a.pad_top <= a.pad, "pad_top", a.pad_top, "it must be from 0 to the padding");
  const int64_t rows = static_cast<int64_t>(a.out_height - 1) * a.stride - a.pad_top;
  const int64_t columns = static_cast<int64_t>(a.out_width - 1) * a.stride - a.pad;
  require(rows + a.kernel <= a.height + a.pad, "out_height", a.out_height,
          "it reaches past the padded input");
  require(columns + a.kernel <= a.width + a.pad, "out_width", a.out_width,
          "it reaches past the padded input");
}

int Program::add(Step step) {
  steps_.push_back(step);
  return size() - 1;
}

void Program::run(const std::vector<uint64_t>& slots, int begin, int end,
                  std::vector<double>* seconds) const {
  using Clock = std::chrono::steady_clock;
  if (begin < 0 || end > size())
    throw std::out_of_range("the program has " + std::to_string(size()) + " steps");
  const Binder binder{slots};
  for (int i = begin; i < end; ++i) {
    Step step = steps_.at(i);
    std::visit([&](auto& s) { bind(s, binder); }, step);
    const auto start = Clock::now();
    run_step(step);
    if (seconds) seconds->push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
}

void run_step(const Step& step) {
  std::visit([](const auto& s) { p2pfast::run(s); }, step);
}

}  // namespace p2pfast
