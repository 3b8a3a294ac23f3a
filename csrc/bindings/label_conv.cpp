#include "cpu/label_conv.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

#ifdef P2PFAST_WITH_CUDA
#include "cuda/label_conv.h"
#endif

namespace py = pybind11;

namespace p2pfast {
namespace {

LabelConvShape make_shape(int64_t batch, int64_t height, int64_t width, int classes, bool has_edges, int cout,
                          int kernel, int pool_levels, bool reflect, int64_t band_rows) {
  const LabelConvShape shape{batch, height, width,       classes, has_edges,
                             cout,  kernel, pool_levels, reflect, band_rows};
  label_conv_check(shape);
  return shape;
}

template <class T>
T* pointer(uintptr_t address, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string("label_conv: ") + name + " is null");
  return reinterpret_cast<T*>(address);
}

void run(const LabelConvShape& shape, uintptr_t labels, uintptr_t edges, uintptr_t packed, uintptr_t out,
         bool out_bf16, uintptr_t scratch, uintptr_t partials, uintptr_t uniform) {
  if (shape.batch == 0) return;
  if (shape.has_edges != (edges != 0))
    throw std::invalid_argument("label_conv: edges are to be given exactly when the shape has_edges");
  if (partials != 0 && shape.band_rows == 0)
    throw std::invalid_argument("label_conv: partials need band_rows > 0 in the shape");
  if (uniform != 0 && shape.classes > 255)
    throw std::invalid_argument(
        "label_conv: uniform marks other windows with 255, which needs at most 255 classes");
  if (scratch % 8 != 0) throw std::invalid_argument("label_conv: scratch must be aligned to 8 bytes");
  label_conv().run({shape, pointer<const uint8_t>(labels, "labels"), reinterpret_cast<const uint8_t*>(edges),
                    pointer<const float>(packed, "packed"), pointer<void>(out, "out"), out_bf16,
                    reinterpret_cast<float*>(partials), reinterpret_cast<uint8_t*>(uniform),
                    pointer<void>(scratch, "scratch")});
}

#ifdef P2PFAST_WITH_CUDA
void bind_cuda_label_conv(py::module_& m) {
  m.def(
      "cuda_label_conv_sizes",
      [](const LabelConvShape& shape) {
        const cuda::LabelConvSizes sizes = cuda::label_conv_sizes(shape);
        py::dict found;
        found["packed_floats"] = sizes.tables.packed_floats;
        found["out_height"] = sizes.tables.out_height;
        found["out_width"] = sizes.tables.out_width;
        found["parts"] = sizes.parts;
        found["scratch_bytes"] = sizes.scratch_bytes;
        return found;
      },
      py::arg("shape"));
  m.def("cuda_label_conv_parts", &cuda::label_conv_parts, py::kw_only(), py::arg("rows"), py::arg("width"),
        "Parts of statistics of so many output rows.");
  m.def(
      "cuda_label_conv_pack",
      [](const LabelConvShape& shape, uintptr_t weight, uintptr_t bias, uintptr_t packed, int device,
         uintptr_t stream) {
        cuda::label_conv_pack(shape, reinterpret_cast<const float*>(weight),
                              reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(packed), device,
                              stream);
      },
      py::arg("shape"), py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("packed"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_label_conv",
      [](const LabelConvShape& shape, uintptr_t labels, int label_bytes, uintptr_t edges, uintptr_t ids,
         int id_bytes, uintptr_t packed, uintptr_t out, int type, int64_t out_stride, uintptr_t scratch,
         int device, uintptr_t stream, uintptr_t partials, uintptr_t counts, uintptr_t uniform,
         int64_t row_begin, int64_t row_end) {
        cuda::label_conv({shape, reinterpret_cast<const void*>(labels), label_bytes,
                          reinterpret_cast<const uint8_t*>(edges), reinterpret_cast<const void*>(ids),
                          id_bytes, reinterpret_cast<const float*>(packed), reinterpret_cast<void*>(out),
                          static_cast<cuda::StoredType>(type), out_stride, reinterpret_cast<float*>(partials),
                          reinterpret_cast<float*>(counts), reinterpret_cast<uint8_t*>(uniform),
                          reinterpret_cast<void*>(scratch), row_begin, row_end},
                         device, stream);
      },
      py::arg("shape"), py::kw_only(), py::arg("labels"), py::arg("label_bytes"), py::arg("edges") = 0,
      py::arg("ids") = 0, py::arg("id_bytes") = 0, py::arg("packed"), py::arg("out"), py::arg("type"),
      py::arg("out_stride"), py::arg("scratch") = 0, py::arg("device"), py::arg("stream"),
      py::arg("partials") = 0, py::arg("counts") = 0, py::arg("uniform") = 0, py::arg("row_begin") = 0,
      py::arg("row_end") = 0, py::call_guard<py::gil_scoped_release>(),
      "Runs the convolution; see csrc/cuda/label_conv.h for the buffers. 0 is a null address.");
}
#endif

}  // namespace

void bind_label_conv(py::module_& m) {
  py::class_<LabelConvShape>(m, "LabelConvShape")
      .def(py::init(&make_shape), py::kw_only(), py::arg("batch"), py::arg("height"), py::arg("width"),
           py::arg("classes"), py::arg("has_edges"), py::arg("cout"), py::arg("kernel"),
           py::arg("pool_levels") = 0, py::arg("reflect") = true, py::arg("band_rows") = 0);

  py::class_<LabelConvLayout>(m, "LabelConvLayout")
      .def(py::init(&label_conv_layout), py::arg("shape"))
      .def_readonly("channels", &LabelConvLayout::channels)
      .def_readonly("stride", &LabelConvLayout::stride)
      .def_readonly("out_height", &LabelConvLayout::out_height)
      .def_readonly("out_width", &LabelConvLayout::out_width)
      .def_readonly("bands", &LabelConvLayout::bands)
      .def_readonly("packed_floats", &LabelConvLayout::packed_floats)
      .def_readonly("output_elements", &LabelConvLayout::output_elements)
      .def_readonly("partial_floats", &LabelConvLayout::partial_floats)
      .def_readonly("uniform_bytes", &LabelConvLayout::uniform_bytes)
      .def_readonly("scratch_bytes", &LabelConvLayout::scratch_bytes);

  m.def(
      "label_conv_pack",
      [](const LabelConvShape& shape, uintptr_t weight, uintptr_t bias, uintptr_t packed) {
        label_conv().pack(shape, pointer<const float>(weight, "weight"), reinterpret_cast<const float*>(bias),
                          pointer<float>(packed, "packed"));
      },
      py::arg("shape"), py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("packed"),
      py::call_guard<py::gil_scoped_release>(), "Builds the tables of a convolution from its weights.");
  m.def(
      "label_conv_max_label",
      [](uintptr_t labels, int64_t count) {
        if (count < 0) throw std::invalid_argument("label_conv: count is negative");
        return count == 0 ? 0 : label_conv().max_label(pointer<const uint8_t>(labels, "labels"), count);
      },
      py::kw_only(), py::arg("labels"), py::arg("count"), py::call_guard<py::gil_scoped_release>(),
      "The largest of count uint8 labels.");
  m.def("label_conv", &run, py::arg("shape"), py::kw_only(), py::arg("labels"), py::arg("edges"),
        py::arg("packed"), py::arg("out"), py::arg("out_bf16"), py::arg("scratch"), py::arg("partials") = 0,
        py::arg("uniform") = 0, py::call_guard<py::gil_scoped_release>(),
        "Runs the convolution; see csrc/cpu/label_conv.h for the buffers. 0 is a null address.");
#ifdef P2PFAST_WITH_CUDA
  bind_cuda_label_conv(m);
#endif
}

}  // namespace p2pfast
