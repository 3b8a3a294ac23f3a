// The outputs of the schemes of toom.h as matrices, which weight gradients need.
#pragma once

#include "cpu/toom.h"

namespace p2pfast::P2PFAST_LEVEL {

template <class S>
struct OutputOf;
template <class F, int kOut, int kFilter>
struct OutputOf<Stride1<F, kOut, kFilter>> {
  static constexpr double at(int out, int sum) { return F::m.at[out][sum]; }
};
template <class F, int kOut>
struct OutputOf<Stride2Taps4<F, kOut>> {
  static constexpr double at(int out, int sum) { return F::m.at[out][sum]; }
};
template <class F, int kOut>
struct OutputOf<Stride2Taps3<F, kOut>> {
  static constexpr double at(int out, int sum) {
    return sum < F::kPoints ? F::m.at[out][sum] : sum - F::kPoints == out ? 1.0 : 0.0;
  }
};
template <class S>
constexpr double output_at(int out, int sum) {
  return OutputOf<S>::at(out, sum);
}

}  // namespace p2pfast::P2PFAST_LEVEL
