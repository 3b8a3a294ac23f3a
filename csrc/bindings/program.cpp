// Programs of the runtime and single steps, described by dictionaries whose keys are the fields of
// the argument structs; addresses are integers.
#include "cpu/program.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/data_gradient.h"
#include "cpu/parallel.h"
#include "cpu/weight_gradient.h"

namespace py = pybind11;

namespace p2pfast {
namespace {

// Reads a dictionary's fields, each with a default, and refuses names that nothing reads.
class Fields {
 public:
  explicit Fields(const py::dict& dict) : dict_(dict) {}

  template <class T>
  T get(const char* name, T fallback) {
    ++seen_;
    if (!dict_.contains(name)) {
      --seen_;
      return fallback;
    }
    return dict_[name].cast<T>();
  }
  template <class T>
  T need(const char* name) {
    if (!dict_.contains(name))
      throw std::invalid_argument(std::string("the field '") + name + "' is missing");
    return get<T>(name, T{});
  }
  template <class T>
  T* pointer(const char* name) {
    return reinterpret_cast<T*>(get<uint64_t>(name, 0));
  }
  template <class E>
  E choice(const char* name, int count) {
    const int value = get<int>(name, 0);
    if (value < 0 || value >= count)
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must be below " +
                                  std::to_string(count));
    return static_cast<E>(value);
  }
  void done() const {
    if (seen_ != dict_.size())
      throw std::invalid_argument("an unknown field: " + py::repr(dict_).cast<std::string>());
  }

 private:
  py::dict dict_;
  size_t seen_ = 0;
};

Source read_source(const py::dict& dict) {
  Fields f(dict);
  Source s{};
  s.data = f.pointer<const void>("data");
  s.image_stride = f.need<int64_t>("image_stride");
  s.row_stride = f.need<int64_t>("row_stride");
  s.pixel_stride = f.need<int64_t>("pixel_stride");
  s.channel_stride = f.get<int64_t>("channel_stride", 1);
  s.dtype = f.choice<DType>("dtype", 2);
  s.channels = f.need<int>("channels");
  s.scale = f.pointer<const float>("scale");
  s.shift = f.pointer<const float>("shift");
  s.norm_stride = f.get<int64_t>("norm_stride", 0);
  s.act = f.choice<Act>("act", 3);
  s.slope = f.get<float>("slope", 0.0f);
  f.done();
  if ((s.scale == nullptr) != (s.shift == nullptr))
    throw std::invalid_argument("a source's scale and shift go together");
  return s;
}

Output read_output(const py::dict& dict) {
  Fields f(dict);
  Output o{};
  o.data = f.pointer<void>("data");
  o.image_stride = f.need<int64_t>("image_stride");
  o.row_stride = f.need<int64_t>("row_stride");
  o.pixel_stride = f.need<int64_t>("pixel_stride");
  o.channel_stride = f.get<int64_t>("channel_stride", 1);
  o.dtype = f.choice<DType>("dtype", 2);
  f.done();
  return o;
}

ConvArgs read_conv(const py::dict& dict) {
  Fields f(dict);
  ConvArgs a{};
  const auto sources = f.need<std::vector<py::dict>>("sources");
  a.sources = static_cast<int>(sources.size());
  if (a.sources < 1 || a.sources > 2)
    throw std::invalid_argument("sources has " + std::to_string(a.sources) +
                                " entries; 1 or 2 are supported");
  for (int i = 0; i < a.sources; ++i) a.source[i] = read_source(sources[i]);
  a.images = f.need<int>("images");
  a.height = f.need<int>("height");
  a.width = f.need<int>("width");
  a.out_height = f.need<int>("out_height");
  a.out_width = f.need<int>("out_width");
  a.out_channels = f.need<int>("out_channels");
  a.kernel_h = f.need<int>("kernel_h");
  a.kernel_w = f.need<int>("kernel_w");
  a.stride = f.get<int>("stride", 1);
  a.pad_top = f.get<int>("pad_top", 0);
  a.pad_left = f.get<int>("pad_left", 0);
  a.transposed = f.get<bool>("transposed", false);
  a.pad = f.choice<Pad>("pad", 3);
  a.weight = f.pointer<const void>("weight");
  a.weight_dtype = f.choice<DType>("weight_dtype", 2);
  a.packed_dtype = f.choice<Packed>("packed_dtype", 3);
  a.weight_out_stride = f.need<int64_t>("weight_out_stride");
  a.weight_in_stride = f.need<int64_t>("weight_in_stride");
  a.weight_turned = f.get<bool>("weight_turned", false);
  a.packed = f.pointer<const float>("packed");
  a.bias = f.pointer<const float>("bias");
  a.out = read_output(f.need<py::dict>("out"));
  a.act = f.choice<Act>("act", 8);
  a.slope = f.get<float>("slope", 0.0f);
  a.partial = f.pointer<float>("partial");
  a.count = f.pointer<float>("count");
  a.workspace = f.pointer<void>("workspace");
  a.block = f.get<int>("block", 0);
  a.group = f.get<int>("group", 0);
  a.uniform = f.pointer<const uint8_t>("uniform");
  a.out_uniform = f.pointer<uint8_t>("out_uniform");
  f.done();
  check(a);
  return a;
}

ConvAlgorithm read_algorithm(int algorithm) {
  if (algorithm < 0 || algorithm >= kConvAlgorithms)
    throw std::invalid_argument("algorithm is " + std::to_string(algorithm) + "; it must be below " +
                                std::to_string(kConvAlgorithms));
  return static_cast<ConvAlgorithm>(algorithm);
}

ConvStep read_conv_step(int algorithm, const py::dict& dict) {
  ConvStep step{read_conv(dict), read_algorithm(algorithm)};
  if (const char* reason = conv_kernel(step.algorithm).refuses(step.args))
    throw std::invalid_argument(reason);
  const ConvArgs& a = step.args;
  const bool skips = step.algorithm == ConvAlgorithm::kWinograd ||
                     step.algorithm == ConvAlgorithm::kWinograd2 ||
                     step.algorithm == ConvAlgorithm::kWinograd6;
  if (a.out_uniform && (!a.uniform || !skips))
    throw std::invalid_argument(
        "out_uniform needs uniform and the algorithm winograd, winograd2 or winograd6");
  bool complete = a.out.data && a.workspace && (a.partial == nullptr) == (a.count == nullptr);
  for (int i = 0; i < a.sources; ++i) complete = complete && a.source[i].data;
  const bool sorts =
      step.algorithm == ConvAlgorithm::kStreamed || step.algorithm == ConvAlgorithm::kStreamed2;
  const bool packs = conv_kernel(step.algorithm).packed_floats(a) > 0;
  complete = complete && ((packs && a.packed) || ((sorts || !packs) && a.weight));
  if (!complete)
    throw std::invalid_argument(
        "data, out, workspace, the packed weights (or weight) and partial with count need an address");
  return step;
}

// Without addresses for the results, only the number of parts can be asked for.
StatisticsArgs read_statistics(const py::dict& dict, bool complete) {
  Fields f(dict);
  StatisticsArgs a{};
  a.source = read_source(f.need<py::dict>("source"));
  a.images = f.need<int>("images");
  a.height = f.need<int>("height");
  a.width = f.need<int>("width");
  a.channels = a.source.channels;
  a.partial = f.pointer<float>("partial");
  a.count = f.pointer<float>("count");
  f.done();
  if (complete) check(a);
  return a;
}

MergeArgs read_merge(const py::dict& dict) {
  Fields f(dict);
  MergeArgs a{};
  a.partial = f.pointer<const float>("partial");
  a.count = f.pointer<const float>("count");
  a.images = f.need<int>("images");
  a.channels = f.need<int>("channels");
  a.parts = f.need<int64_t>("parts");
  a.over_batch = f.get<bool>("over_batch", false);
  a.eps = f.need<float>("eps");
  a.weight = f.pointer<const float>("weight");
  a.bias = f.pointer<const float>("bias");
  a.scale = f.pointer<float>("scale");
  a.shift = f.pointer<float>("shift");
  a.mean = f.pointer<float>("mean");
  a.variance = f.pointer<float>("variance");
  f.done();
  check(a);
  return a;
}

ApplyArgs read_apply(const py::dict& dict) {
  Fields f(dict);
  ApplyArgs a{};
  a.first = read_source(f.need<py::dict>("first"));
  const auto second = f.get<py::object>("second", py::none());
  if (!second.is_none()) a.second = read_source(second.cast<py::dict>());
  a.noise = f.pointer<const float>("noise");
  a.images = f.need<int>("images");
  a.height = f.need<int>("height");
  a.width = f.need<int>("width");
  a.channels = a.first.channels;
  a.out = read_output(f.need<py::dict>("out"));
  a.act = f.choice<Act>("act", 8);
  a.slope = f.get<float>("slope", 0.0f);
  f.done();
  check(a);
  return a;
}

PoolArgs read_pool(const py::dict& dict) {
  Fields f(dict);
  PoolArgs a{};
  a.source = read_source(f.need<py::dict>("source"));
  a.images = f.need<int>("images");
  a.height = f.need<int>("height");
  a.width = f.need<int>("width");
  a.channels = a.source.channels;
  a.out_height = f.need<int>("out_height");
  a.out_width = f.need<int>("out_width");
  a.kernel = f.need<int>("kernel");
  a.stride = f.need<int>("stride");
  a.pad = f.get<int>("pad", 0);
  a.pad_top = f.get<int>("pad_top", a.pad);
  a.count_include_pad = f.get<bool>("count_include_pad", true);
  a.out = read_output(f.need<py::dict>("out"));
  f.done();
  check(a);
  return a;
}

LabelConvArgs read_label_conv(const py::dict& dict) {
  Fields f(dict);
  LabelConvArgs a{};
  a.shape.batch = f.need<int64_t>("batch");
  a.shape.height = f.need<int64_t>("height");
  a.shape.width = f.need<int64_t>("width");
  a.shape.classes = f.need<int>("classes");
  a.shape.has_edges = f.need<bool>("has_edges");
  a.shape.cout = f.need<int>("cout");
  a.shape.kernel = f.need<int>("kernel");
  a.shape.pool_levels = f.need<int>("pool_levels");
  a.shape.reflect = f.need<bool>("reflect");
  a.shape.band_rows = f.need<int64_t>("band_rows");
  a.labels = f.pointer<const uint8_t>("labels");
  a.edges = f.pointer<const uint8_t>("edges");
  a.packed = f.pointer<const float>("packed");
  a.out = f.pointer<void>("out");
  a.out_bf16 = f.need<bool>("out_bf16");
  a.partials = f.pointer<float>("partials");
  a.uniform = f.pointer<uint8_t>("uniform");
  a.scratch = f.pointer<void>("scratch");
  a.row_begin = f.get<int64_t>("row_begin", 0);
  a.row_end = f.get<int64_t>("row_end", 0);
  f.done();
  label_conv_check(a.shape);
  const int64_t height = label_conv_layout(a.shape).out_height;
  const int64_t end = a.row_end > 0 ? a.row_end : height;
  if (a.row_begin < 0 || a.row_begin >= end || end > height)
    throw std::invalid_argument("row_begin and row_end are " + std::to_string(a.row_begin) + " and " +
                                std::to_string(a.row_end) + "; they must be rows of the output");
  return a;
}

InstanceEdges read_edges(const py::dict& dict) {
  Fields f(dict);
  InstanceEdges a{};
  a.ids = f.pointer<const void>("ids");
  a.element_size = f.need<int>("element_size");
  a.edges = f.pointer<uint8_t>("edges");
  a.images = f.need<int64_t>("images");
  a.height = f.need<int64_t>("height");
  a.width = f.need<int64_t>("width");
  a.image_stride = f.need<int64_t>("image_stride");
  a.row_stride = f.need<int64_t>("row_stride");
  f.done();
  return a;
}

py::dict conv_info(int algorithm, const py::dict& dict) {
  const ConvArgs args = read_conv(dict);
  const ConvKernel& kernel = conv_kernel(read_algorithm(algorithm));
  py::dict info;
  if (const char* reason = kernel.refuses(args)) {
    info["refuses"] = reason;
    return info;
  }
  info["refuses"] = py::none();
  info["packed_floats"] = kernel.packed_floats(args);
  info["workspace_bytes"] = kernel.workspace_bytes(args, num_threads());
  info["partials"] = kernel.partials(args);
  info["multiplications"] = kernel.multiplications(args);
  return info;
}

Source as_source(const Output& out, int channels) {
  Source s{};
  s.data = out.data;
  s.image_stride = out.image_stride;
  s.row_stride = out.row_stride;
  s.pixel_stride = out.pixel_stride;
  s.channel_stride = out.channel_stride;
  s.dtype = out.dtype;
  s.channels = channels;
  return s;
}

// A convolution's dictionary in which `out` is where the output's gradient lies.
WeightGradientArgs read_weight_gradient(const py::dict& dict) {
  WeightGradientArgs a{};
  a.conv = read_conv(dict);
  a.grad = as_source(a.conv.out, a.conv.out_channels);
  return a;
}

// The same, and `result` is where the input's gradient goes.
DataGradientArgs read_data_gradient(const py::dict& dict, const py::dict& result) {
  DataGradientArgs a{};
  a.conv = read_conv(dict);
  a.grad = as_source(a.conv.out, a.conv.out_channels);
  a.out = read_output(result);
  a.workspace = a.conv.workspace;
  if (const char* reason = data_gradient().refuses(a)) throw std::invalid_argument(reason);
  return a;
}

// With `complete` also its addresses are looked at; without, only sizes can be asked for.
WeightGradientStep read_weight_gradient_step(int algorithm, const py::dict& dict, uint64_t result, int dtype,
                                             bool complete) {
  if (algorithm < 0 || algorithm >= kWeightGradientAlgorithms)
    throw std::invalid_argument("algorithm is " + std::to_string(algorithm) + "; it must be below " +
                                std::to_string(kWeightGradientAlgorithms));
  if (dtype != 0 && dtype != 1)
    throw std::invalid_argument("result_dtype is " + std::to_string(dtype) + "; it must be 0 or 1");
  WeightGradientStep step{read_weight_gradient(dict), static_cast<WeightGradientAlgorithm>(algorithm)};
  WeightGradientArgs& a = step.args;
  a.out = reinterpret_cast<void*>(result);
  a.out_dtype = static_cast<DType>(dtype);
  a.workspace = a.conv.workspace;
  if (a.conv.transposed)
    throw std::invalid_argument("transposed is true; exchange the input and the gradient instead");
  if (const char* reason = weight_gradient_kernel(step.algorithm).refuses(a))
    throw std::invalid_argument(reason);
  bool given = a.out && a.workspace && a.grad.data;
  for (int i = 0; i < a.conv.sources; ++i) given = given && a.conv.source[i].data;
  if (complete && !given) throw std::invalid_argument("data, out, workspace and result need an address");
  return step;
}

PackStep read_pack_step(int algorithm, const py::dict& dict, uint64_t packed) {
  PackStep step{read_conv(dict), read_algorithm(algorithm), reinterpret_cast<float*>(packed)};
  const ConvKernel& kernel = conv_kernel(step.algorithm);
  if (const char* reason = kernel.refuses(step.args)) throw std::invalid_argument(reason);
  if (kernel.packed_floats(step.args) > 0 && (!step.args.weight || !packed))
    throw std::invalid_argument("weight and packed need an address");
  return step;
}

void run_now(Step step) {
  py::gil_scoped_release release;
  run_step(step);
}

}  // namespace

void bind_program(py::module_& m) {
  m.def("conv_info", &conv_info, py::arg("algorithm"), py::arg("args"),
        "Sizes an algorithm needs for a convolution, or the reason why it refuses it.");
  m.def(
      "conv_pack",
      [](int algorithm, const py::dict& dict, uint64_t packed) {
        const PackStep step = read_pack_step(algorithm, dict, packed);
        if (conv_kernel(step.algorithm).packed_floats(step.args) > 0) run_now(step);
      },
      py::arg("algorithm"), py::arg("args"), py::arg("packed"));
  m.def(
      "weight_gradient_workspace",
      [](int algorithm, const py::dict& dict) {
        const WeightGradientStep step = read_weight_gradient_step(algorithm, dict, 0, 0, false);
        return weight_gradient_kernel(step.algorithm).workspace_bytes(step.args, num_threads());
      },
      py::arg("algorithm"), py::arg("args"));
  m.def(
      "data_gradient_workspace",
      [](const py::dict& dict, const py::dict& result) {
        return data_gradient().workspace_bytes(read_data_gradient(dict, result), num_threads());
      },
      py::arg("args"), py::arg("result"));
  m.def(
      "run_conv", [](int algorithm, const py::dict& dict) { run_now(read_conv_step(algorithm, dict)); },
      py::arg("algorithm"), py::arg("args"), "Runs one convolution with real addresses.");
  m.def("run_statistics", [](const py::dict& dict) { run_now(read_statistics(dict, true)); });
  m.def("run_merge", [](const py::dict& dict) { run_now(read_merge(dict)); });
  m.def("run_apply", [](const py::dict& dict) { run_now(read_apply(dict)); });
  m.def("run_avg_pool", [](const py::dict& dict) { run_now(read_pool(dict)); });
  m.def("statistics_parts",
        [](const py::dict& dict) { return norm_kernels().partials(read_statistics(dict, false)); });
  m.def(
      "slot_address",
      [](int slot, uint64_t offset) {
        if (slot < 0 || slot >= 0xffff) throw std::invalid_argument("slot must be from 0 to 65534");
        if (offset >> 48 != 0) throw std::invalid_argument("offset must be below 2^48");
        return slot_address(slot, offset);
      },
      py::arg("slot"), py::arg("offset"));

  py::class_<Program>(m, "Program", "Steps that run one after another in one call.")
      .def(py::init<>())
      .def("__len__", &Program::size)
      .def("conv",
           [](Program& p, int algorithm, const py::dict& d) { return p.add(read_conv_step(algorithm, d)); })
      .def("pack", [](Program& p, int algorithm, const py::dict& d,
                      uint64_t packed) { return p.add(read_pack_step(algorithm, d, packed)); })
      .def(
          "weight_gradient",
          [](Program& p, int algorithm, const py::dict& d, uint64_t result, int dtype) {
            return p.add(read_weight_gradient_step(algorithm, d, result, dtype, true));
          },
          py::arg("algorithm"), py::arg("args"), py::arg("result"), py::arg("result_dtype"),
          "Writes the weights' gradient of a convolution whose `out` holds the output's gradient.")
      .def(
          "data_gradient",
          [](Program& p, const py::dict& d, const py::dict& result) {
            const DataGradientArgs args = read_data_gradient(d, result);
            if (!args.conv.weight || !args.grad.data || !args.out.data || !args.workspace)
              throw std::invalid_argument("weight, out, result and workspace need an address");
            return p.add(args);
          },
          py::arg("args"), py::arg("result"),
          "Writes the input's gradient of a convolution whose `out` holds the output's gradient.")
      .def("statistics", [](Program& p, const py::dict& d) { return p.add(read_statistics(d, true)); })
      .def("merge", [](Program& p, const py::dict& d) { return p.add(read_merge(d)); })
      .def("apply", [](Program& p, const py::dict& d) { return p.add(read_apply(d)); })
      .def("avg_pool", [](Program& p, const py::dict& d) { return p.add(read_pool(d)); })
      .def("label_conv", [](Program& p, const py::dict& d) { return p.add(read_label_conv(d)); })
      .def("instance_edges", [](Program& p, const py::dict& d) { return p.add(read_edges(d)); })
      .def(
          "run",
          [](const Program& p, const std::vector<uint64_t>& slots, int begin, int end, bool timed) {
            std::vector<double> seconds;
            {
              py::gil_scoped_release release;
              p.run(slots, begin, end, timed ? &seconds : nullptr);
            }
            return seconds;
          },
          py::arg("slots"), py::arg("begin"), py::arg("end"), py::arg("timed") = false,
          "Runs steps [begin, end) with slots[i] as the address of slot i.");
}

}  // namespace p2pfast
