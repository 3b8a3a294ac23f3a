#include "cpu/pointwise_loss.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

namespace py = pybind11;

namespace p2pfast {

void bind_pointwise_loss(py::module_& m) {
  using Part = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int, int, float, float>;
  m.def(
      "pointwise_loss",
      [](int loss, float target, const std::vector<Part>& parts, uintptr_t out) {
        if (!out) throw std::invalid_argument("pointwise_loss: out is null");
        std::vector<LossPart> list;
        for (const auto& [a, b, gradient, count, type, b_type, weight, gradient_weight] : parts)
          list.push_back({reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                          reinterpret_cast<void*>(gradient), count, static_cast<ValueType>(type),
                          static_cast<ValueType>(b_type), weight, gradient_weight, 0});
        *reinterpret_cast<float*>(out) =
            static_cast<float>(pointwise_loss(static_cast<Loss>(loss), target, std::move(list)));
      },
      py::kw_only(), py::arg("loss"), py::arg("target"), py::arg("parts"), py::arg("out"),
      py::call_guard<py::gil_scoped_release>(),
      "Writes one float, the sum of weight * loss over the parts (a, b, gradient, count, type, b_type, "
      "weight, gradient_weight), and "
      "the gradients; addresses are integers, 0 where there is none.");
}

}  // namespace p2pfast
