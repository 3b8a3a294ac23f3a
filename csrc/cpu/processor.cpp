#include "cpu/processor.h"

#include <array>
#include <cstdint>
#include <cstring>

#ifdef P2PFAST_X86
#include <cpuid.h>
#endif

namespace p2pfast {

#ifdef P2PFAST_X86
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// All zero where the processor has no such leaf: then it lacks every feature reported there.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

struct Features {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512bf16;
  bool os_ymm, os_zmm;  // the operating system saves these registers
};

constexpr bool bit(uint64_t word, int n) { return (word >> n) & 1; }

Features detect() {
  const Registers one = cpuid(1, 0);
  const Registers seven = cpuid(7, 0);
  const Registers seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{};
  uint64_t saved = 0;
  if (bit(one.c, 27)) {  // OSXSAVE: XGETBV may be used
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    saved = (static_cast<uint64_t>(high) << 32) | low;
  }
  Features f{};
  f.os_ymm = (saved & 0x06) == 0x06;
  f.os_zmm = (saved & 0xe6) == 0xe6;
  f.fma = bit(one.c, 12);
  f.f16c = bit(one.c, 29);
  f.avx2 = bit(seven.b, 5);
  f.avx512f = bit(seven.b, 16);
  f.avx512dq = bit(seven.b, 17);
  f.avx512bw = bit(seven.b, 30);
  f.avx512vl = bit(seven.b, 31);
  f.avx512bf16 = bit(seven_one.a, 5);
  return f;
}

const Features& features() {
  static const Features found = detect();
  return found;
}

}  // namespace

std::string missing_for(Level level) {
  const Features& f = features();
  std::string missing;
  const auto need = [&](bool has, const char* what) {
    if (has) return;
    if (!missing.empty()) missing += ", ";
    missing += what;
  };
  if (level >= Level::kAvx2) {
    need(f.avx2, "AVX2");
    need(f.fma, "FMA");
    need(f.f16c, "F16C");
    need(f.os_ymm, "operating-system support for 256-bit registers");
  }
#ifndef P2PFAST_EMULATE_WIDE  // then these levels are made of AVX2 instructions
  if (level >= Level::kAvx512) {
    need(f.avx512f, "AVX-512F");
    need(f.avx512bw, "AVX-512BW");
    need(f.avx512vl, "AVX-512VL");
    need(f.avx512dq, "AVX-512DQ");
    need(f.os_zmm, "operating-system support for 512-bit registers");
  }
  if (level >= Level::kAvx512Bf16) need(f.avx512bf16, "AVX-512-BF16");
#endif
  return missing;
}

std::string processor_name() {
  if (cpuid(0x80000000u, 0).a < 0x80000004u) return "";
  std::array<char, 49> text{};
  for (unsigned i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i, 0);
    const unsigned words[] = {r.a, r.b, r.c, r.d};
    std::memcpy(text.data() + 16 * i, words, 16);
  }
  std::string name = text.data();
  name.erase(0, name.find_first_not_of(' '));
  name.erase(name.find_last_not_of(' ') + 1);
  return name;
}

#else

std::string missing_for(Level level) { return level == Level::kBaseline ? "" : "an x86-64 processor"; }

std::string processor_name() { return ""; }

#endif

}  // namespace p2pfast
