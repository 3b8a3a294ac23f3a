// What the processor and the operating system offer, read once with CPUID and XGETBV.
#pragma once

#include <string>

#include "cpu/level.h"

namespace p2pfast {

// The processor's own name ("AMD EPYC ..."), or "" where it cannot be read.
std::string processor_name();

// What this machine lacks for a level, separated by ", "; "" if it can run it.
std::string missing_for(Level level);

}  // namespace p2pfast
