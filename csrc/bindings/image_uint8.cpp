#include "cpu/image_uint8.h"

#include <pybind11/pybind11.h>

#ifdef P2PFAST_WITH_CUDA
#include "cuda/image_uint8.h"
#endif

namespace py = pybind11;

namespace p2pfast {
namespace {

ImageUint8 pack(uintptr_t data, int type, int64_t images, int64_t channels, int64_t height, int64_t width,
                int64_t image_stride, int64_t channel_stride, int64_t row_stride, int64_t pixel_stride,
                bool tanh, uintptr_t out) {
  return {reinterpret_cast<const void*>(data),
          static_cast<PixelType>(type),
          images,
          channels,
          height,
          width,
          image_stride,
          channel_stride,
          row_stride,
          pixel_stride,
          tanh,
          reinterpret_cast<uint8_t*>(out)};
}

}  // namespace

void bind_image_uint8(py::module_& m) {
  m.def(
      "image_uint8",
      [](uintptr_t data, int type, int64_t images, int64_t channels, int64_t height, int64_t width,
         int64_t image_stride, int64_t channel_stride, int64_t row_stride, int64_t pixel_stride, bool tanh,
         uintptr_t out) {
        image_uint8(pack(data, type, images, channels, height, width, image_stride, channel_stride,
                         row_stride, pixel_stride, tanh, out));
      },
      py::kw_only(), py::arg("data"), py::arg("type"), py::arg("images"), py::arg("channels"),
      py::arg("height"), py::arg("width"), py::arg("image_stride"), py::arg("channel_stride"),
      py::arg("row_stride"), py::arg("pixel_stride"), py::arg("tanh"), py::arg("out"),
      py::call_guard<py::gil_scoped_release>(),
      "Converts images to 8-bit pixels; type is 0 (float32), 1 (bfloat16) or 2 (float16).");
#ifdef P2PFAST_WITH_CUDA
  m.def(
      "cuda_image_uint8",
      [](uintptr_t data, int type, int64_t images, int64_t channels, int64_t height, int64_t width,
         int64_t image_stride, int64_t channel_stride, int64_t row_stride, int64_t pixel_stride, bool tanh,
         uintptr_t out, int device, uintptr_t stream) {
        cuda::image_uint8(pack(data, type, images, channels, height, width, image_stride, channel_stride,
                               row_stride, pixel_stride, tanh, out),
                          device, stream);
      },
      py::kw_only(), py::arg("data"), py::arg("type"), py::arg("images"), py::arg("channels"),
      py::arg("height"), py::arg("width"), py::arg("image_stride"), py::arg("channel_stride"),
      py::arg("row_stride"), py::arg("pixel_stride"), py::arg("tanh"), py::arg("out"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace p2pfast
