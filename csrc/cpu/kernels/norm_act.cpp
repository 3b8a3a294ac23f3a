#include "cpu/norm_act.h"

#include "cpu/norm_act_bands.h"
#include "cpu/norm_act_planes.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

template <class F>
void with_act(const NormActArgs& a, F&& call) {
  auto typed = [&]<Act kAct>() {
    a.dtype == DType::kFloat32 ? call.template operator()<float, kAct>()
                               : call.template operator()<bf16, kAct>();
  };
  switch (a.act) {
    case Act::kRelu:
      return typed.template operator()<Act::kRelu>();
    case Act::kLeaky:
      return typed.template operator()<Act::kLeaky>();
    case Act::kTanh:
      return typed.template operator()<Act::kTanh>();
    case Act::kSigmoid:
      return typed.template operator()<Act::kSigmoid>();
    case Act::kElu:
      return typed.template operator()<Act::kElu>();
    case Act::kSilu:
      return typed.template operator()<Act::kSilu>();
    default:
      return typed.template operator()<Act::kNone>();
  }
}

void run_forward(const NormActArgs& a) {
  with_act(a,
           [&]<class T, Act kAct>() { a.planes ? forward_planes<T, kAct>(a) : forward_bands<T, kAct>(a); });
}

void run_backward(const NormActArgs& a) {
  with_act(a,
           [&]<class T, Act kAct>() { a.planes ? backward_planes<T, kAct>(a) : backward_bands<T, kAct>(a); });
}

}  // namespace

const NormActKernels norm_act_kernels = {run_forward, run_backward};

}  // namespace p2pfast::P2PFAST_LEVEL
