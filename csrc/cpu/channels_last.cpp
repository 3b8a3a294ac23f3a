#include "cpu/channels_last.h"

#include <stdexcept>
#include <string>

namespace p2pfast {

void channels_last(const ChannelsLast& args) {
  const auto require = [](bool good, const char* member, int64_t value, const char* remedy) {
    if (!good)
      throw std::invalid_argument(std::string("channels_last: ") + member + " is " + std::to_string(value) +
                                  "; " + remedy);
  };
  require(args.images >= 0, "images", args.images, "it must not be negative");
  require(args.channels >= 0, "channels", args.channels, "it must not be negative");
  require(args.height >= 0, "height", args.height, "it must not be negative");
  require(args.width >= 0, "width", args.width, "it must not be negative");
  for (const DType dtype : {args.dtype, args.out_dtype})
    require(dtype == DType::kFloat32 || dtype == DType::kBFloat16, "dtype", static_cast<int>(dtype),
            "it must be 0 (float32) or 1 (bfloat16)");
  if (args.images == 0 || args.channels == 0 || args.height == 0 || args.width == 0) return;
  if (args.data == nullptr || args.out == nullptr)
    throw std::invalid_argument("channels_last: data or out is null");
  channels_last_kernels().run(args);
}

}  // namespace p2pfast
