#include "cpu/peak.h"

#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

template <class B>
double run(int rounds) {
  constexpr int kRows = full_rows(kPanelVectors), kDepth = 96;
  const int64_t tasks = num_threads();
  parallel_for(tasks, [&](int64_t, int) {
    alignas(64) Factor<B> a[kRows][kDepth];
    alignas(64) B b[kDepth * kPanel];
    alignas(64) float c[kRows * kPanel];
    std::memset(a, 0, sizeof(a));
    std::memset(b, 0, sizeof(b));
    const Factor<B>* rows[kRows];
    for (int m = 0; m < kRows; ++m) rows[m] = a[m];
    const auto micro = gemm_micros(b).of[kPanelVectors][kRows];
    for (int i = 0; i < rounds; ++i)
      micro(rows, b, c, kPanel, kDepth, i > 0, reinterpret_cast<const char*>(b), 0);
  });
  return static_cast<double>(tasks) * rounds * kRows * kPanel * kDepth * kValues<B>;
}

}  // namespace

const PeakKernels peak_kernels = {run<float>, run<Pair>};

}  // namespace p2pfast::P2PFAST_LEVEL
