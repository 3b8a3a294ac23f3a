#include "cpu/norm_act.h"

#include <pybind11/pybind11.h>

#include <vector>

namespace py = pybind11;

namespace p2pfast {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_norm_act(py::module_& m) {
  m.def(
      "norm_act",
      [](bool backward, uintptr_t x, uintptr_t residual, uintptr_t dy, uintptr_t out, uintptr_t dresidual,
         int dtype, bool planes, int64_t images, int64_t channels, int64_t pixels, bool over_batch,
         bool frozen, float eps, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t variance,
         uintptr_t dweight, uintptr_t dbias, int act, float slope) {
        NormActArgs args = {at<const void>(x),
                            at<const void>(residual),
                            at<const void>(dy),
                            at<void>(out),
                            at<void>(dresidual),
                            static_cast<DType>(dtype),
                            planes,
                            images,
                            channels,
                            pixels,
                            over_batch,
                            frozen,
                            eps,
                            at<const float>(weight),
                            at<const float>(bias),
                            at<float>(mean),
                            at<float>(variance),
                            at<float>(dweight),
                            at<float>(dbias),
                            static_cast<Act>(act),
                            slope,
                            nullptr};
        // Too little to be worth a tensor of the caller's.
        thread_local std::vector<float> workspace;
        workspace.resize(static_cast<size_t>(norm_act_workspace(args)));
        args.workspace = workspace.data();
        backward ? norm_act_backward(args) : norm_act_forward(args);
      },
      py::kw_only(), py::arg("backward"), py::arg("x"), py::arg("residual") = 0, py::arg("dy") = 0,
      py::arg("out"), py::arg("dresidual") = 0, py::arg("dtype"), py::arg("planes"), py::arg("images"),
      py::arg("channels"), py::arg("pixels"), py::arg("over_batch"), py::arg("frozen"), py::arg("eps") = 0,
      py::arg("weight") = 0, py::arg("bias") = 0, py::arg("mean"), py::arg("variance"),
      py::arg("dweight") = 0, py::arg("dbias") = 0, py::arg("act"), py::arg("slope") = 0,
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace p2pfast
