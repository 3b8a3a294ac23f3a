#include "cpu/channels_last.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace p2pfast {

void bind_channels_last(py::module_& m) {
  m.def(
      "channels_last",
      [](uintptr_t data, int dtype, int64_t images, int64_t channels, int64_t height, int64_t width,
         int64_t image_stride, int64_t channel_stride, int64_t row_stride, uintptr_t out, int out_dtype) {
        channels_last({reinterpret_cast<const void*>(data), static_cast<DType>(dtype), images, channels,
                       height, width, image_stride, channel_stride, row_stride, reinterpret_cast<void*>(out),
                       static_cast<DType>(out_dtype)});
      },
      py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("images"), py::arg("channels"),
      py::arg("height"), py::arg("width"), py::arg("image_stride"), py::arg("channel_stride"),
      py::arg("row_stride"), py::arg("out"), py::arg("out_dtype"), py::call_guard<py::gil_scoped_release>(),
      "Writes planes as pixels of adjacent channels; dtypes are 0 (float32) or 1 (bfloat16).");
}

}  // namespace p2pfast
