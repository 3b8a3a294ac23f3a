#include "cpu/direct.h"

namespace p2pfast::P2PFAST_LEVEL {

const ConvKernel conv_direct = {
    direct_refuses,
    [](const ConvArgs& args) { return Direct{args}.packed_floats(); },
    [](const ConvArgs& args, float* packed) {
      const Direct direct{args};
      with_packed(args, [&]<class B>() {
        B* to = reinterpret_cast<B*>(packed);
        args.weight_dtype == DType::kFloat32 ? direct.pack_from<float>(to) : direct.pack_from<bf16>(to);
      });
    },
    [](const ConvArgs& args, int threads) { return Direct{args}.workspace(threads); },
    [](const ConvArgs& args) { return Direct{args}.blocks(); },
    [](const ConvArgs& args) { return Direct{args}.multiplications(); },
    [](const ConvArgs& args) { Direct{args}.run(); },
};

}  // namespace p2pfast::P2PFAST_LEVEL
