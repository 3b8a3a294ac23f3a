#include "cpu/image_uint8.h"

#include <stdexcept>
#include <string>

namespace p2pfast {
namespace {

void require(bool good, const char* member, int64_t value, const char* remedy) {
  if (!good)
    throw std::invalid_argument(std::string("image_uint8: ") + member + " is " + std::to_string(value) +
                                "; " + remedy);
}

}  // namespace

void check(const ImageUint8& a) {
  require(a.channels >= 1 && a.channels <= 4, "channels", a.channels, "it must be from 1 to 4");
  require(a.images >= 0, "images", a.images, "it must not be negative");
  require(a.height >= 0, "height", a.height, "it must not be negative");
  require(a.width >= 0, "width", a.width, "it must not be negative");
  const int type = static_cast<int>(a.type);
  require(type >= 0 && type <= 2, "type", type, "it must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  if (a.images == 0 || a.height == 0 || a.width == 0) return;
  if (a.data == nullptr || a.out == nullptr) throw std::invalid_argument("image_uint8: data or out is null");
}

void image_uint8(const ImageUint8& args) {
  check(args);
  if (args.images == 0 || args.height == 0 || args.width == 0) return;
  image_uint8_kernels().run(args);
}

}  // namespace p2pfast
