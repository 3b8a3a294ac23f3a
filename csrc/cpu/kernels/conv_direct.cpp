#include "cpu/direct.h"

namespace p2pfast::P2PFAST_LEVEL {

const ConvKernel conv_direct = {
    direct_refuses,
    [](const ConvArgs& args) { return Direct{args}.packed_floats(); },
    [](const ConvArgs& args, float* packed) {
      if (args.weight_dtype == DType::kFloat32) {
        Direct{args}.pack_from<float>(packed);
      } else {
        Direct{args}.pack_from<bf16>(packed);
      }
    },
    [](const ConvArgs& args, int threads) { return Direct{args}.workspace(threads); },
    [](const ConvArgs& args) { return Direct{args}.blocks(); },
    [](const ConvArgs& args) { return Direct{args}.multiplications(); },
    [](const ConvArgs& args) { Direct{args}.run(); },
};

}  // namespace p2pfast::P2PFAST_LEVEL
