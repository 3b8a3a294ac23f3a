// The last block of arrays of more than 2^32 elements, in memory that is reserved but for the pages it
// touches.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>

#include "cuda/image_uint8_kernel.h"
#include "cuda/instance_pool_kernel.h"
#include "cuda/label_conv_kernel.h"
#include "cuda/pointwise_loss_kernel.h"
#include "emulate.h"
#include "testing.h"

namespace {

// Zeros; null where the system has no room for the addresses.
template <class T>
class Reserved {
 public:
  explicit Reserved(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    void* const p =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = p == MAP_FAILED ? nullptr : static_cast<T*>(p);
    if (data_ == nullptr) std::printf("skipped: %zu bytes of addresses are not to be had\n", bytes_);
  }
  ~Reserved() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
  size_t bytes_;
};

constexpr int64_t kHeight = 4096, kWidth = 8192;

struct LastBlock {
  template <class Kernel>
  void operator()(const typename Kernel::Args& args, int64_t blocks) const {
    p2pfast::testing::emulate_blocks<Kernel>(args, blocks - 1, blocks);
  }
};

TEST(cuda_image_uint8_indexes_beyond_32_bits) {
  constexpr int64_t kImages = 64, kCount = kImages * kHeight * kWidth * 3;
  const Reserved<float> x(kCount);
  const Reserved<uint8_t> out(kCount);
  if (x.data() == nullptr || out.data() == nullptr) return;
  x.data()[kCount - 1] = 1.0f;
  p2pfast::cuda::with_image_uint8_kernel({x.data(), p2pfast::PixelType::kFloat32, kImages, 3, kHeight, kWidth,
                                          kHeight * kWidth * 3, 1, kWidth * 3, 3, false, out.data()},
                                         []<class Kernel>(const typename Kernel::Args& args) {
                                           LastBlock{}.operator()<Kernel>(args, Kernel::blocks(args));
                                         });
  CHECK(out.data()[kCount - 1] == 255 && out.data()[kCount - 2] == 127);
}

TEST(cuda_label_conv_indexes_beyond_32_bits) {
  for (const int32_t pool_levels : {0, 1}) {
    p2pfast::LabelConvShape shape{};
    shape.batch = 20 << 2 * pool_levels;
    shape.height = kHeight;
    shape.width = kWidth;
    shape.classes = 2;
    shape.cout = 32;
    shape.kernel = 3;
    shape.pool_levels = pool_levels;
    const p2pfast::LabelConvLayout layout = p2pfast::label_conv_layout(shape);
    const int64_t labels_count = shape.batch * kHeight * kWidth;
    const Reserved<uint8_t> labels(labels_count);
    const Reserved<float> packed(layout.packed_floats), out(layout.output_elements);
    const Reserved<uint8_t> scratch(p2pfast::cuda::label_conv_scratch(shape, nullptr, nullptr) + 64);
    if (labels.data() == nullptr || out.data() == nullptr || scratch.data() == nullptr) return;
    // Weights of 1 for label 1, whose corner fills the last tile and its border.
    for (int64_t i = 0; i < 32; ++i) packed.data()[layout.constants + layout.stride + i] = 9.0f;
    for (int64_t y = kHeight - 40; y < kHeight; ++y)
      for (int64_t x = kWidth - 600; x < kWidth; ++x)
        labels.data()[(shape.batch - 1) * kHeight * kWidth + y * kWidth + x] = 1;
    p2pfast::cuda::LabelConvCall call{};
    call.shape = shape;
    call.labels = labels.data();
    call.label_bytes = 1;
    call.packed = packed.data();
    call.out = out.data();
    call.out_stride = 32;
    call.scratch = scratch.data();
    p2pfast::cuda::run_label_conv(call, []<class Kernel>(const typename Kernel::Args& args, int64_t blocks) {
      // Of pooling, the last 20 rows as well: the border of the last tile.
      constexpr bool kPools = std::is_same_v<Kernel, p2pfast::cuda::LabelPoolKernel<false>>;
      p2pfast::testing::emulate_blocks<Kernel>(args, blocks - (kPools ? 20 * (kWidth / 512) : 1), blocks);
    });
    CHECK(layout.output_elements > int64_t{1} << 32);
    CHECK(out.data()[layout.output_elements - 1] == 9.0f);
    CHECK(out.data()[layout.output_elements - 33] == 9.0f);
  }
}

TEST(cuda_pointwise_loss_indexes_beyond_32_bits) {
  constexpr int64_t kCount = int64_t{20} * kHeight * kWidth * 8 + 5;
  const Reserved<uint16_t> a(kCount), gradient(kCount);
  const Reserved<double> sums(p2pfast::cuda::ceil_div(kCount, p2pfast::kLossChunk));
  if (a.data() == nullptr || gradient.data() == nullptr) return;
  a.data()[kCount - 1] = 0x4040;  // 3 in bfloat16
  float out;
  p2pfast::cuda::run_pointwise_loss(
      p2pfast::Loss::kSquare, 0.0f,
      {{a.data(), nullptr, gradient.data(), kCount, p2pfast::ValueType::kBFloat16,
        p2pfast::ValueType::kBFloat16, 1.0f, 1.0f, 0}},
      sums.data(), &out, LastBlock{});
  CHECK(out == 9.0f);
  CHECK(gradient.data()[kCount - 1] == 0x40c0 && gradient.data()[kCount - 2] == 0);  // 6
}

TEST(cuda_instance_pool_indexes_beyond_32_bits) {
  constexpr int64_t kImages = 9, kChannels = 16, kPixels = kHeight * kWidth, kAll = kImages * kPixels;
  const Reserved<float> features(kAll * kChannels), out(kAll * kChannels);
  const Reserved<int64_t> region(kAll), order(kAll);
  if (features.data() == nullptr || out.data() == nullptr || region.data() == nullptr ||
      order.data() == nullptr)
    return;
  // Two regions, the second one the last two pixels.
  region.data()[kAll - 1] = region.data()[kAll - 2] = 1;
  order.data()[kAll - 1] = kAll - 1;
  order.data()[kAll - 2] = kAll - 2;
  features.data()[kAll * kChannels - 1] = 3.0f;
  const int64_t start[] = {0, kAll - 2, kAll};
  const int64_t chunks = p2pfast::cuda::ceil_div(kAll - 2, p2pfast::cuda::kPoolChunk);
  const int64_t first_chunk[] = {0, chunks, chunks + 1};
  const Reserved<double> partials((chunks + 1) * kChannels);
  float means[2 * kChannels];
  p2pfast::cuda::run_instance_pool(
      {features.data(), out.data(), 0, kImages, kChannels, kPixels, kPixels * kChannels, 1, kChannels,
       region.data(), order.data(), start, first_chunk, 2, chunks + 1, partials.data(), means},
      LastBlock{});
  CHECK(out.data()[kAll * kChannels - 1] == 1.5f && out.data()[kAll * kChannels - 2] == 0.0f);
  CHECK(out.data()[kAll * kChannels - 1 - kChannels] == 1.5f);
}

}  // namespace
