#include "cpu/direct.h"

namespace p2pfast::P2PFAST_LEVEL {

const ConvKernel conv_direct = {
    direct_refuses,
    [](const ConvArgs& args) { return Direct{args}.packed_floats(); },
    [](const ConvArgs& args, float* packed) {
      const Direct direct{args};
      auto pack = [&](auto* to) {
        args.weight_dtype == DType::kFloat32 ? direct.pack_from<float>(to) : direct.pack_from<bf16>(to);
      };
      args.packed_dtype == DType::kFloat32 ? pack(packed) : pack(reinterpret_cast<bf16*>(packed));
    },
    [](const ConvArgs& args, int threads) { return Direct{args}.workspace(threads); },
    [](const ConvArgs& args) { return Direct{args}.blocks(); },
    [](const ConvArgs& args) { return Direct{args}.multiplications(); },
    [](const ConvArgs& args) { Direct{args}.run(); },
};

}  // namespace p2pfast::P2PFAST_LEVEL
