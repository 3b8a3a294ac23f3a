#include "cpu/pointwise_loss.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#ifdef P2PFAST_WITH_CUDA
#include "cuda/pointwise_loss.h"
#endif

namespace py = pybind11;

namespace p2pfast {
namespace {

using Part = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int, int, float, float>;

std::vector<LossPart> listed(const std::vector<Part>& parts) {
  std::vector<LossPart> list;
  for (const auto& [a, b, gradient, count, type, b_type, weight, gradient_weight] : parts)
    list.push_back({reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                    reinterpret_cast<void*>(gradient), count, static_cast<ValueType>(type),
                    static_cast<ValueType>(b_type), weight, gradient_weight, 0});
  return list;
}

}  // namespace

void bind_pointwise_loss(py::module_& m) {
  m.def(
      "pointwise_loss",
      [](int loss, float target, const std::vector<Part>& parts, uintptr_t out) {
        if (!out) throw std::invalid_argument("pointwise_loss: out is null");
        *reinterpret_cast<float*>(out) =
            static_cast<float>(pointwise_loss(static_cast<Loss>(loss), target, listed(parts)));
      },
      py::kw_only(), py::arg("loss"), py::arg("target"), py::arg("parts"), py::arg("out"),
      py::call_guard<py::gil_scoped_release>(),
      "Writes one float, the sum of weight * loss over the parts (a, b, gradient, count, type, b_type, "
      "weight, gradient_weight), and "
      "the gradients; addresses are integers, 0 where there is none.");
#ifdef P2PFAST_WITH_CUDA
  m.def(
      "cuda_pointwise_loss_sums",
      [](const std::vector<Part>& parts) { return cuda::pointwise_loss_sums(listed(parts)); }, py::kw_only(),
      py::arg("parts"), "float64 values of workspace that cuda_pointwise_loss needs.");
  m.def(
      "cuda_pointwise_loss",
      [](int loss, float target, const std::vector<Part>& parts, uintptr_t workspace, uintptr_t out,
         int device, uintptr_t stream) {
        cuda::pointwise_loss(static_cast<Loss>(loss), target, listed(parts),
                             reinterpret_cast<double*>(workspace), reinterpret_cast<float*>(out), device,
                             stream);
      },
      py::kw_only(), py::arg("loss"), py::arg("target"), py::arg("parts"), py::arg("workspace"),
      py::arg("out"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  using Scale = std::tuple<uintptr_t, uintptr_t, int64_t, int, float>;
  m.def(
      "cuda_pointwise_scale",
      [](const std::vector<Scale>& parts, uintptr_t factor, int device, uintptr_t stream) {
        std::vector<cuda::ScalePart> list;
        for (const auto& [from, to, count, type, own] : parts)
          list.push_back({reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), count, own,
                          static_cast<ValueType>(type)});
        cuda::pointwise_scale(list, reinterpret_cast<const float*>(factor), device, stream);
      },
      py::kw_only(), py::arg("parts"), py::arg("factor"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>(),
      "to = from * factor * own of the parts (from, to, count, type, own); factor is on the device.");
#endif
}

}  // namespace p2pfast
