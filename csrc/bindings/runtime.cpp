#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/borrowed.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/processor.h"

namespace py = pybind11;

namespace p2pfast {
namespace {

// The levels compiled into this module, lowest first.
std::vector<std::string> compiled_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < kLevels; ++i)
    if (compiled(static_cast<Level>(i))) names.emplace_back(level_name(static_cast<Level>(i)));
  return names;
}

std::string missing_for_name(const std::string& name) {
  for (int i = 0; i < kLevels; ++i) {
    if (name == level_name(static_cast<Level>(i))) return missing_for(static_cast<Level>(i));
  }
  throw std::invalid_argument("level " + name + " is unknown");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = P2PFAST_BUILD_COMPILER;
  info["build_type"] = P2PFAST_BUILD_TYPE;
  info["levels"] = compiled_levels();
  info["cuda"] = P2PFAST_CUDA_VERSION;                      // "" when built without
  info["cuda_architectures"] = P2PFAST_CUDA_ARCHITECTURES;  // separated by spaces
  info["cuda_reason"] = P2PFAST_CUDA_REASON;                // why it was built without
#ifdef P2PFAST_EMULATE_WIDE
  info["emulate_wide"] = true;
#else
  info["emulate_wide"] = false;
#endif
  return info;
}

}  // namespace

void bind_runtime(py::module_& m) {
  m.def(
      "active_level", [] { return level_name(active_level()); },
      "The instruction-set level in use: P2PFAST_CPU if set, else the highest supported.");
  m.def("supported_level", [] { return level_name(supported_level()); });
  m.def("multiplies_pairs", &multiplies_pairs,
        "Whether the active level has instructions for products of bfloat16 pairs.");
  m.def(
      "run_peak",
      [](bool pairs, int rounds) {
        py::gil_scoped_release release;
        return (pairs ? peak_kernels().run_pairs : peak_kernels().run)(rounds);
      },
      py::arg("pairs"), py::arg("rounds"),
      "Runs the matrix kernel on operands in the caches, on every thread; the multiplications that it did.");
  m.def("levels", &compiled_levels, "Names of the compiled levels, lowest first.");
  m.def("missing_for", &missing_for_name, py::arg("level"),
        "What this machine lacks for a level; '' if nothing.");
  m.def("set_active_level", [](const std::string& name) { set_active_level(name.c_str()); }, py::arg("name"));
  m.def("num_threads", &num_threads, "Threads that kernels called from this thread use.");
  m.def(
      "set_num_threads",
      [](int threads, bool borrowed) {
        if (threads < 1)
          throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be at least 1");
        set_num_threads(threads);
        borrow_threads(borrowed);
      },
      py::arg("threads"), py::arg("borrowed") = false,
      "Sets the number of threads for kernels called from this thread, and whether they are those of the "
      "region.");
  m.def(
      "set_parallel_region",
      [](uint64_t address) { set_parallel_region(reinterpret_cast<ParallelRegion>(address)); },
      py::arg("address"), "The address of GOMP_parallel of an OpenMP library to run on, or 0.");
  m.def("processor_name", &processor_name);
  m.def("build_info", &build_info);
}

}  // namespace p2pfast
