// csrc/cpu/label_conv.h on an NVIDIA GPU: the same tables and sums, a tile of pixels a block.
// Mathematics: p2pfast/ops/label_conv/README.md.
//
// How to call it:
//   LabelConvShape shape = {...};                               // band_rows 0
//   LabelConvSizes sizes = cuda::label_conv_sizes(shape);       // of everything below
//   cuda::label_conv_pack(shape, weight, bias, packed, device, stream);   // once per weight
//   cuda::label_conv(args, device, stream);
// Addresses are on `device`; `stream` is a cudaStream_t (torch's `cuda_stream`), 0 the default one. Nothing
// is allocated or initialised; calls return before the work is done and can be captured into a CUDA graph.
// They throw std::invalid_argument naming what is wrong, and std::runtime_error with CUDA's own message if a
// launch fails.
#pragma once

#include <cstdint>

#include "cpu/label_conv.h"

namespace p2pfast::cuda {

enum class StoredType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct LabelConvSizes {
  LabelConvLayout tables;  // channels, out_height, out_width and the packed tables
  int64_t parts;           // of statistics an image, for all its rows
  int64_t scratch_bytes;   // 0 at full resolution; most of it is touched only for mixed pixels
};

struct LabelConvCall {
  LabelConvShape shape;
  // (N, H, W) dense, of 1, 2, 4 or 8 bytes, read as unsigned. A window that sees a label that is no class
  // becomes NaN.
  const void* labels;
  int32_t label_bytes;
  // With shape.has_edges one of these: (N, H, W) dense bytes, nonzero = edge; or instance ids (N, H, W) dense
  // of 1, 2, 4 or 8 bytes, whose edges (csrc/cpu/instance_edges.h) are found on the way.
  const uint8_t* edges;
  const void* ids;
  int32_t id_bytes;
  const float* packed;  // aligned to 16 bytes
  // (N, H', W') pixels, out_stride elements from one to the next, of which cout are written.
  void* out;
  StoredType type;
  int64_t out_stride;
  // null, or (N, parts, 2, cout): mean and sum of squared deviations of each part of the float32 values.
  float* partials;
  float* counts;     // null, or (parts): how many pixels a part has
  uint8_t* uniform;  // as on the CPU
  void* scratch;     // sizes.scratch_bytes, aligned to 8 bytes
  // Only output rows [row_begin, row_end) of each image, as on the CPU; row_end 0: up to the last.
  int64_t row_begin = 0, row_end = 0;
};

LabelConvSizes label_conv_sizes(const LabelConvShape& shape);
// The number of parts of that many output rows.
int64_t label_conv_parts(int64_t rows, int64_t width);

void label_conv_pack(const LabelConvShape& shape, const float* weight, const float* bias, float* packed,
                     int device, uintptr_t stream);
void label_conv(const LabelConvCall& call, int device, uintptr_t stream);

}  // namespace p2pfast::cuda
