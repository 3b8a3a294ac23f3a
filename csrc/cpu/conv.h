// Convolution with everything that a conv-norm-act chain fuses into it: the deferred normalisation
// and activation of its inputs, padding by index, two inputs instead of a concatenation, bias,
// activation and the statistics of its output. One description for all algorithms.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/level.h"

namespace p2pfast {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };
// Of packed weights and the products with them, which sum in float32. kBFloat16 widens weights to float32;
// kPairs rounds the (transformed) input to bfloat16 too and multiplies pairs of channels: made for processors
// with an instruction for that, and the same values, more slowly, on others.
enum class Packed : int32_t { kFloat32 = 0, kBFloat16 = 1, kPairs = 2 };
enum class Act : int32_t {
  kNone = 0,
  kRelu = 1,
  kLeaky = 2,
  kTanh = 3,
  kSigmoid = 4,
  kElu = 5,
  kSilu = 6,
  kGelu = 7
};
enum class Pad : int32_t { kZero = 0, kReflect = 1, kReplicate = 2 };

// One input. The value used is act(scale[n, c] * data[n, y, x, c] + shift[n, c]).
struct Source {
  const void* data;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;  // in elements
  DType dtype;
  int32_t channels;
  const float* scale;   // null: the raw value
  const float* shift;   // used with scale
  int64_t norm_stride;  // from one image's scale to the next
  Act act;              // kNone, kRelu or kLeaky
  float slope;
};

// Output pixel (y, x) channel c of image n is stored at
// data[n * image_stride + y * row_stride + x * pixel_stride + c * channel_stride].
// NHWC outputs (channel_stride 1) have room for round_up(channels, 16) channels a pixel, and what
// the lanes past `channels` hold is unspecified: readers take whole vectors and drop those lanes.
struct Output {
  void* data;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;
  DType dtype;
};

struct ConvArgs {
  Source source[2];
  int32_t sources;
  int32_t images, height, width;  // of the input
  int32_t out_height, out_width, out_channels;
  int32_t kernel_h, kernel_w, stride, pad_top, pad_left;
  bool transposed;
  Pad pad;
  // Raw weights: element (o, i, ky, kx) at o * weight_out_stride + i * weight_in_stride + ky * kernel_w + kx,
  // or the kernel lies turned by 180 degrees there.
  const void* weight;
  DType weight_dtype;
  Packed packed_dtype;  // thin kernels keep float32
  int64_t weight_out_stride, weight_in_stride;
  bool weight_turned;
  const float* packed;  // what pack() wrote; may be null where the algorithm only sorts weights
  const float* bias;    // out_channels values or null
  Output out;
  Act act;
  float slope;
  // Statistics of the (float32) output before `act`, for each image and each of conv_partials() parts:
  // partial[((n * parts + p) * 2 + {0: mean, 1: M2}) * round_up(out_channels, 16) + c], and the number
  // of pixels of the part in count[n * parts + p]. Null: not wanted.
  float* partial;
  float* count;
  void* workspace;
  int32_t block;  // size parameter of the algorithm (tiles or pixels of a block)
  int32_t group;  // output channels of a task
  // Where the input is one vector of channels for each label (but for rounding): images x height x width
  // labels, 255 for any other pixel. The packed Winograd algorithms compute one tile of each label and copy
  // it. Null: nothing is known.
  const uint8_t* uniform;
  uint8_t* out_uniform;  // the same of the output, or null; only with uniform
};

// Where the weight of tap (ky, kx) lies among those of its channels.
inline int64_t tap_offset(const ConvArgs& args, int ky, int kx) {
  const int64_t at = static_cast<int64_t>(ky) * args.kernel_w + kx;
  return args.weight_turned ? static_cast<int64_t>(args.kernel_h) * args.kernel_w - 1 - at : at;
}

enum class ConvAlgorithm : int32_t {
  kDirect = 0,     // implicit GEMM; packed weights
  kWinograd = 1,   // blocks of tiles, transformed weights packed once
  kWinograd2 = 2,  // the same with two outputs a tile and dimension (3x3 stride 1)
  kStreamed = 3,   // all tiles at once, sorted weights transformed on the fly: few tiles, many channels
  kStreamed2 = 4,
  kThin = 5,       // few output channels: taps folded into columns
  kWinograd6 = 6,  // blocks of tiles with six outputs a dimension (3x3 stride 1)
};
inline constexpr int kConvAlgorithms = 7;

struct ConvKernel {
  // Why this shape cannot run here, or null.
  const char* (*refuses)(const ConvArgs& args);
  int64_t (*packed_floats)(const ConvArgs& args);
  // Writes packed_floats() floats from args.weight, in parallel.
  void (*pack)(const ConvArgs& args, float* packed);
  int64_t (*workspace_bytes)(const ConvArgs& args, int threads);
  int64_t (*partials)(const ConvArgs& args);
  // Multiplications that one call does (for the share of peak).
  double (*multiplications)(const ConvArgs& args);
  void (*run)(const ConvArgs& args);
};

P2PFAST_PER_LEVEL(ConvKernel, conv_direct)
P2PFAST_PER_LEVEL(ConvKernel, conv_winograd)
P2PFAST_PER_LEVEL(ConvKernel, conv_winograd2)
P2PFAST_PER_LEVEL(ConvKernel, conv_streamed)
P2PFAST_PER_LEVEL(ConvKernel, conv_streamed2)
P2PFAST_PER_LEVEL(ConvKernel, conv_thin)
P2PFAST_PER_LEVEL(ConvKernel, conv_winograd6)

inline const ConvKernel& conv_kernel(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
      return conv_winograd();
    case ConvAlgorithm::kWinograd2:
      return conv_winograd2();
    case ConvAlgorithm::kStreamed:
      return conv_streamed();
    case ConvAlgorithm::kStreamed2:
      return conv_streamed2();
    case ConvAlgorithm::kThin:
      return conv_thin();
    case ConvAlgorithm::kWinograd6:
      return conv_winograd6();
    default:
      return conv_direct();
  }
}

}  // namespace p2pfast
