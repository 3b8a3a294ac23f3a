#include "cpu/winograd.h"
#include "cpu/winograd_skip.h"

namespace p2pfast::P2PFAST_LEVEL {

const ConvKernel conv_winograd = packed_winograd<4>();
const ConvKernel conv_streamed = streamed_winograd<4>();

}  // namespace p2pfast::P2PFAST_LEVEL
