// The outputs of the schemes of toom.h as matrices, which weight gradients need, and the transpose of a
// scheme, which data gradients are.
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

// What a scheme of stride 1 becomes where the loss's derivative goes backward through it: kOut values of the
// output's gradient become points, and the sums become what the tile adds to its window of the input's
// gradient. The results of neighbouring tiles overlap by kTaps - 1.
template <class S>
struct Adjoint;
template <class F, int kOut, int kFilter>
struct Adjoint<Stride1<F, kOut, kFilter>> {
  using Forward = Stride1<F, kOut, kFilter>;
  static constexpr int kTaps = kFilter, kWindow = kOut, kStepIn = kOut, kStepOut = Forward::kWindow;
  static constexpr int kPoints = F::kPoints, kSums = F::kPoints;
  static constexpr int origin(int) { return 0; }
  static constexpr int sum_of(int point) { return point; }
  static constexpr double weight(int point, int tap) { return Forward::weight(point, tap); }
  struct Input {
    static constexpr double at(int point, int i) { return F::m.at[i][point]; }
  };
  struct Output {
    static constexpr double at(int i, int sum) { return F::m.bt[sum][i]; }
  };
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<Input, kPoints, kWindow>(d, sd, o, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<Output, kStepOut, kSums>(d, sd, o, so);
  }
};

}  // namespace p2pfast::P2PFAST_LEVEL
