#include "cpu/norm_act.h"

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

void check(const NormActArgs& a) {
  require(a.images >= 1, "images", a.images, "it must be at least 1");
  require(a.channels >= 1, "channels", a.channels, "it must be at least 1");
  require(a.pixels >= 1, "pixels", a.pixels, "it must be at least 1");
  const int dtype = static_cast<int>(a.dtype), act = static_cast<int>(a.act);
  require(dtype == 0 || dtype == 1, "dtype", dtype, "it must be 0 (float32) or 1 (bfloat16)");
  require(act >= 0 && act <= static_cast<int>(Act::kSilu), "act", act, "it must be from 0 to 6");
  need(a.x, "x");
  need(a.out, "out");
  need(a.mean, "mean");
  need(a.rstd, "rstd");
}

}  // namespace

int64_t norm_act_partials(const NormActArgs& a) {
  if (a.planes) return 0;
  return a.images * ((a.pixels + kNormBand - 1) / kNormBand) * 2 * a.channels;
}

void norm_act_forward(const NormActArgs& args) {
  check(args);
  require(args.planes, "planes", args.planes, "only planes have this forward pass");
  norm_act_kernels().forward(args);
}

void norm_act_backward(const NormActArgs& args) {
  check(args);
  need(args.dy, "dy");
  need(args.dweight, "dweight");
  need(args.dbias, "dbias");
  if (!args.planes) need(args.partial, "partial");
  norm_act_kernels().backward(args);
}

}  // namespace p2pfast
