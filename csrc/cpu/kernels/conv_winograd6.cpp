#include "cpu/winograd.h"
#include "cpu/winograd_skip.h"

namespace p2pfast::P2PFAST_LEVEL {

const ConvKernel conv_winograd6 = packed_winograd<6>();

}  // namespace p2pfast::P2PFAST_LEVEL
