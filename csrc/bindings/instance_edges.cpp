#include "cpu/instance_edges.h"

#include <pybind11/pybind11.h>

#ifdef P2PFAST_WITH_CUDA
#include "cuda/instance_edges.h"
#endif

namespace py = pybind11;

namespace p2pfast {
namespace {

InstanceEdges pack(uintptr_t ids, int element_size, uintptr_t edges, int64_t images, int64_t height,
                   int64_t width, int64_t image_stride, int64_t row_stride) {
  return {reinterpret_cast<const void*>(ids),
          element_size,
          reinterpret_cast<uint8_t*>(edges),
          images,
          height,
          width,
          image_stride,
          row_stride};
}

}  // namespace

void bind_instance_edges(py::module_& m) {
  m.def(
      "instance_edges",
      [](uintptr_t ids, int element_size, uintptr_t edges, int64_t images, int64_t height, int64_t width,
         int64_t image_stride, int64_t row_stride) {
        instance_edges(pack(ids, element_size, edges, images, height, width, image_stride, row_stride));
      },
      py::kw_only(), py::arg("ids"), py::arg("element_size"), py::arg("edges"), py::arg("images"),
      py::arg("height"), py::arg("width"), py::arg("image_stride"), py::arg("row_stride"),
      py::call_guard<py::gil_scoped_release>());
#ifdef P2PFAST_WITH_CUDA
  m.def(
      "cuda_instance_edges",
      [](uintptr_t ids, int element_size, uintptr_t edges, int64_t images, int64_t height, int64_t width,
         int64_t image_stride, int64_t row_stride, int device, uintptr_t stream) {
        cuda::instance_edges(pack(ids, element_size, edges, images, height, width, image_stride, row_stride),
                             device, stream);
      },
      py::kw_only(), py::arg("ids"), py::arg("element_size"), py::arg("edges"), py::arg("images"),
      py::arg("height"), py::arg("width"), py::arg("image_stride"), py::arg("row_stride"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace p2pfast
