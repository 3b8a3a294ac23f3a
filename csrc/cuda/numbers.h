// The floating-point types that kernels store, and vector loads and stores of them; on the GPU and on the
// host.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/phases.h"

namespace p2pfast::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

P2PFAST_HD uint32_t bits_of(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
#endif
}

P2PFAST_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
#endif
}

P2PFAST_HD float widened(float v) { return v; }
P2PFAST_HD float widened(BFloat16 v) { return float_of(uint32_t{v.bits} << 16); }

P2PFAST_HD float widened(Float16 v) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  // The exponent is rebased by a multiplication, which also takes care of subnormal numbers.
  const uint32_t h = v.bits, special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const float finite = float_of((h & 0x7fffu) << 13) * 0x1p112f;
  return float_of(bits_of(finite) | special | ((h & 0x8000u) << 16));
#endif
}

P2PFAST_HD void narrow(float v, float* to) { *to = v; }

// To the nearest, ties to even; a NaN stays a quiet NaN.
P2PFAST_HD void narrow(float v, BFloat16* to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#else
  const uint32_t w = bits_of(v);
  const uint32_t rounded = v != v ? 0x7fff0000u : w + 0x7fffu + ((w >> 16) & 1u);
  to->bits = static_cast<uint16_t>(rounded >> 16);
#endif
}

P2PFAST_HD void narrow(float v, Float16* to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#else
  const uint32_t w = bits_of(v), magnitude = w & 0x7fffffffu;
  uint32_t r;
  if (v != v) {
    r = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {
    r = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 0.5's unit in the last place is float16's smallest step
    r = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    r = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(r | ((w >> 16) & 0x8000u));
#endif
}

// kCount values that are read or written by one instruction; the address is a multiple of their size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

template <int kCount, class T>
P2PFAST_HD Pack<T, kCount> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, kCount>*>(p);
}

template <class T, int kCount>
P2PFAST_HD void store_pack(T* p, const Pack<T, kCount>& v) {
  *reinterpret_cast<Pack<T, kCount>*>(p) = v;
}

}  // namespace p2pfast::cuda
