#include "cpu/norm_act.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace p2pfast {
namespace {

void require(bool good, const char* member, int64_t value, const char* remedy) {
  if (!good)
    throw std::invalid_argument(std::string("norm_act: ") + member + " is " + std::to_string(value) + "; " +
                                remedy);
}

void need(const void* p, const char* member) {
  if (!p) throw std::invalid_argument(std::string("norm_act: ") + member + " is null");
}

void check_sizes(const NormActArgs& a) {
  require(a.images >= 1, "images", a.images, "it must be at least 1");
  require(a.channels >= 1, "channels", a.channels, "it must be at least 1");
  require(a.pixels >= 1, "pixels", a.pixels, "it must be at least 1");
}

void check(const NormActArgs& a) {
  check_sizes(a);
  const int dtype = static_cast<int>(a.dtype), act = static_cast<int>(a.act);
  require(dtype == 0 || dtype == 1, "dtype", dtype, "it must be 0 (float32) or 1 (bfloat16)");
  require(act >= 0 && act <= static_cast<int>(Act::kSilu), "act", act, "it must be from 0 to 6");
  need(a.x, "x");
  need(a.out, "out");
  need(a.mean, "mean");
  need(a.variance, "variance");
  need(a.workspace, "workspace");
}

// In float64: x - mean may be small beside x, and what is left is multiplied by this.
void set_rstd(const NormActArgs& a) {
  float* const rstd = norm_act_rstd(a);
  for (int64_t i = 0, n = norm_act_means(a); i < n; ++i)
    rstd[i] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.variance[i]) + a.eps));
}

}  // namespace

int64_t norm_act_workspace(const NormActArgs& a) {
  check_sizes(a);
  const int64_t bands = a.planes ? 0 : (a.pixels + kNormBand - 1) / kNormBand;
  return 3 * norm_act_means(a) + a.images * bands * 2 * a.channels;
}

void norm_act_forward(const NormActArgs& args) {
  check(args);
  if (args.frozen) set_rstd(args);
  norm_act_kernels().forward(args);
}

void norm_act_backward(const NormActArgs& args) {
  check(args);
  need(args.dy, "dy");
  need(args.dweight, "dweight");
  need(args.dbias, "dbias");
  set_rstd(args);
  norm_act_kernels().backward(args);
  const float *sum = norm_act_sums(args), *product = norm_act_products(args);
  for (int64_t c = 0; c < args.channels; ++c) {
    double bias = 0, weight = 0;
    for (int64_t i = c; i < norm_act_means(args); i += args.channels) {
      bias += sum[i];
      weight += product[i];
    }
    args.dbias[c] = static_cast<float>(bias);
    args.dweight[c] = static_cast<float>(weight);
  }
}

}  // namespace p2pfast
