#include "cpu/label_conv.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

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
}

}  // namespace p2pfast
