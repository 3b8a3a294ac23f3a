#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/label_conv.h"
#include "cuda/label_conv_kernel.h"
#include "cuda/launch.h"

namespace p2pfast::cuda {
namespace {

constexpr const char* kName = "label_conv";

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("label_conv: " + what); }

void require(bool good, const char* field, int64_t value, const char* remedy) {
  if (!good) fail(std::string(field) + " is " + std::to_string(value) + "; " + remedy);
}

void check_shape(const LabelConvShape& shape) {
  label_conv_check(shape);
  require(shape.band_rows == 0, "band_rows", shape.band_rows,
          "it must be 0: statistics on CUDA are of tiles");
}

// Bytes of the largest array, or of what an index may reach, must fit.
void check_size(const LabelConvShape& shape, int64_t out_stride) {
  int64_t bytes = std::max<int64_t>(out_stride, 2 * (kLabelConvMaxClasses + 1)) * 4;
  if (__builtin_mul_overflow(bytes, shape.batch, &bytes) ||
      __builtin_mul_overflow(bytes, shape.height, &bytes) ||
      __builtin_mul_overflow(bytes, shape.width, &bytes))
    fail("batch * height * width does not fit into 64 bits; split the batch");
}

void check_buffer(const void* address, size_t bytes, const char* name) {
  if (address == nullptr) fail(std::string(name) + " is null");
  check_aligned(reinterpret_cast<uintptr_t>(address), bytes, kName, name);
}

void check_integers(const void* address, int32_t bytes, const char* name) {
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8)
    fail(std::string(name) + " has elements of " + std::to_string(bytes) +
         " bytes; they must have 1, 2, 4 or 8");
  check_buffer(address, static_cast<size_t>(bytes), name);
}

void check_call(const LabelConvCall& call) {
  const LabelConvShape& shape = call.shape;
  check_shape(shape);
  const int type = static_cast<int>(call.type);
  require(type >= 0 && type <= 2, "type", type, "it must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(call.out_stride >= shape.cout, "out_stride", call.out_stride, "it must be at least cout");
  const int64_t height = label_conv_layout(shape).out_height;
  const int64_t end = call.row_end > 0 ? call.row_end : height;
  require(call.row_begin >= 0 && call.row_begin < end, "row_begin", call.row_begin,
          "it must be below row_end");
  require(call.row_end >= 0 && end <= height, "row_end", call.row_end,
          "it must not be above the output's height");
  check_size(shape, call.out_stride);
  if (shape.batch == 0) return;
  check_integers(call.labels, call.label_bytes, "labels");
  if (shape.has_edges != (call.edges != nullptr || call.ids != nullptr))
    fail("edges or ids are to be given exactly when the shape has_edges");
  if (call.edges != nullptr && call.ids != nullptr) fail("edges and ids are both given; give one of them");
  if (call.ids != nullptr) check_integers(call.ids, call.id_bytes, "ids");
  check_buffer(call.packed, 16, "packed");
  check_buffer(call.out, type == 0 ? 4 : 2, "out");
  if (call.uniform != nullptr)
    require(shape.classes <= 255, "classes", shape.classes,
            "uniform marks other windows with 255: at most 255");
  if (shape.pool_levels > 0) check_buffer(call.scratch, 8, "scratch");
}

}  // namespace

int64_t label_conv_parts(int64_t rows, int64_t width) { return label_conv_tiles(rows, width); }

LabelConvSizes label_conv_sizes(const LabelConvShape& shape) {
  check_shape(shape);
  check_size(shape, shape.cout);
  const LabelConvLayout layout = label_conv_layout(shape);
  return {layout, label_conv_tiles(layout.out_height, layout.out_width),
          label_conv_scratch(shape, nullptr, nullptr)};
}

void label_conv_pack(const LabelConvShape& shape, const float* weight, const float* bias, float* packed,
                     int device, uintptr_t stream) {
  check_shape(shape);
  check_device(device, kName);
  check_buffer(weight, 4, "weight");
  check_buffer(packed, 16, "packed");
  const LabelPackKernel::Args args{label_conv_layout(shape), shape.classes, shape.cout, shape.kernel,
                                   shape.has_edges,          weight,        bias,       packed};
  const DeviceGuard guard(device, kName);
  launch<LabelPackKernel>(args, LabelPackKernel::blocks(args), stream, kName);
}

void label_conv(const LabelConvCall& call, int device, uintptr_t stream) {
  check_call(call);
  check_device(device, kName);
  if (call.shape.batch == 0) return;
  run_label_conv(call, [&]<class Kernel>(const typename Kernel::Args&, int64_t blocks) {
    check_blocks(blocks, kName, "split the batch");
  });
  const DeviceGuard guard(device, kName);
  run_label_conv(call, [&]<class Kernel>(const typename Kernel::Args& args, int64_t blocks) {
    launch<Kernel>(args, blocks, stream, kName);
  });
}

}  // namespace p2pfast::cuda
