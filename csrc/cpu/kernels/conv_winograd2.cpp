#include "cpu/winograd.h"
#include "cpu/winograd_skip.h"

namespace p2pfast::P2PFAST_LEVEL {

const ConvKernel conv_winograd2 = packed_winograd<2>();
const ConvKernel conv_streamed2 = streamed_winograd<2>();

}  // namespace p2pfast::P2PFAST_LEVEL
