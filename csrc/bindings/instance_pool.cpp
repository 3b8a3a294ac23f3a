#include "cpu/instance_pool.h"

#include <pybind11/pybind11.h>

#ifdef P2PFAST_WITH_CUDA
#include "cuda/instance_pool.h"
#endif

namespace py = pybind11;

namespace p2pfast {

void bind_instance_pool(py::module_& m) {
  m.def(
      "instance_regions",
      [](uintptr_t ids, int element_size, int64_t images, int64_t pixels, uintptr_t regions,
         uintptr_t first) {
        instance_regions(reinterpret_cast<const void*>(ids), element_size, images, pixels,
                         reinterpret_cast<int32_t*>(regions), reinterpret_cast<int64_t*>(first));
      },
      py::kw_only(), py::arg("ids"), py::arg("element_size"), py::arg("images"), py::arg("pixels"),
      py::arg("regions"), py::arg("first"), py::call_guard<py::gil_scoped_release>(),
      "Numbers the instances of each image; see csrc/cpu/instance_pool.h.");
  m.def(
      "instance_pool",
      [](uintptr_t features, uintptr_t out, int64_t images, int64_t channels, int64_t pixels,
         int64_t image_stride, int64_t channel_stride, int64_t pixel_stride, uintptr_t regions,
         uintptr_t first) {
        instance_pool({reinterpret_cast<const float*>(features), reinterpret_cast<float*>(out), images,
                       channels, pixels, image_stride, channel_stride, pixel_stride,
                       reinterpret_cast<const int32_t*>(regions), reinterpret_cast<const int64_t*>(first)});
      },
      py::kw_only(), py::arg("features"), py::arg("out"), py::arg("images"), py::arg("channels"),
      py::arg("pixels"), py::arg("image_stride"), py::arg("channel_stride"), py::arg("pixel_stride"),
      py::arg("regions"), py::arg("first"), py::call_guard<py::gil_scoped_release>());
#ifdef P2PFAST_WITH_CUDA
  m.attr("CUDA_POOL_CHUNK") = cuda::kPoolChunk;
  m.def(
      "cuda_instance_pool",
      [](uintptr_t features, uintptr_t out, int type, int64_t images, int64_t channels, int64_t pixels,
         int64_t image_stride, int64_t channel_stride, int64_t pixel_stride, uintptr_t region,
         uintptr_t order, uintptr_t start, uintptr_t first_chunk, int64_t regions, int64_t chunks,
         uintptr_t partials, uintptr_t means, int device, uintptr_t stream) {
        cuda::instance_pool(
            {reinterpret_cast<const void*>(features), reinterpret_cast<void*>(out), type, images, channels,
             pixels, image_stride, channel_stride, pixel_stride, reinterpret_cast<const int64_t*>(region),
             reinterpret_cast<const int64_t*>(order), reinterpret_cast<const int64_t*>(start),
             reinterpret_cast<const int64_t*>(first_chunk), regions, chunks,
             reinterpret_cast<double*>(partials), reinterpret_cast<float*>(means)},
            device, stream);
      },
      py::kw_only(), py::arg("features"), py::arg("out"), py::arg("type"), py::arg("images"),
      py::arg("channels"), py::arg("pixels"), py::arg("image_stride"), py::arg("channel_stride"),
      py::arg("pixel_stride"), py::arg("region"), py::arg("order"), py::arg("start"), py::arg("first_chunk"),
      py::arg("regions"), py::arg("chunks"), py::arg("partials"), py::arg("means"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace p2pfast
