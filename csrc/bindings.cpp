// p2pfast._C. Every file csrc/bindings/<name>.cpp defines bind_<name>; CMake generates the list.
#include <pybind11/pybind11.h>

namespace p2pfast {
#define P2PFAST_BIND(name) void bind_##name(pybind11::module_& m);
#include "bindings.inc"
#undef P2PFAST_BIND
}  // namespace p2pfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of p2pfast: addresses and shapes in, no dependency on torch.";
#define P2PFAST_BIND(name) p2pfast::bind_##name(m);
#include "bindings.inc"
#undef P2PFAST_BIND
}
