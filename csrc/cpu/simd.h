// SIMD helpers on GCC/Clang vector extensions: the same source is every instruction-set level, with
// kLanes floats a vector. Compiled inside each level's namespace, so that no inline function is
// shared between objects built with different instructions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef P2PFAST_LEVEL
#error "simd.h is for files that are compiled once per instruction-set level"
#endif

#define P2PFAST_INLINE inline __attribute__((always_inline))

namespace p2pfast::P2PFAST_LEVEL {

#if defined(P2PFAST_WIDE)  // avx512 and avx512_bf16, also when a test build emulates them with AVX2
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecW __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef uint16_t VecHU __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t VecWU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

using bf16 = uint16_t;  // storage of a bfloat16

// Two bfloat16 values that a product takes at once.
struct Pair {
  bf16 first, second;
};
typedef VecW VecPairs;  // the first of each in the low half

P2PFAST_INLINE Vec splat(float x) { return x - (Vec){}; }
P2PFAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
P2PFAST_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// v, in a register of AVX-512: else GCC reads it from memory again for each of its uses, which takes as long
// as two reads where it lies across two cache lines.
P2PFAST_INLINE Vec held(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

// A store that goes to memory without reading the line first, for data too large to be read again from a
// cache; p is aligned to the vector. finish_streams() orders such stores before what other threads do next.
P2PFAST_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8) {
    __m256 part;
    std::memcpy(&part, reinterpret_cast<const float*>(&v) + i, sizeof(part));
    _mm256_stream_ps(p + i, part);
  }
#else
  store(p, v);
#endif
}
P2PFAST_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
#if defined(__AVX2__)
inline constexpr bool kCanStream = true;
#else
inline constexpr bool kCanStream = false;
#endif

P2PFAST_INLINE float bf16_to_float(bf16 h) {
  const uint32_t w = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &w, 4);
  return f;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
P2PFAST_INLINE bf16 float_to_bf16(float f) {
  uint32_t w;
  std::memcpy(&w, &f, 4);
  if ((w & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((w >> 16) | 0x40u);
  return static_cast<bf16>((w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
}

// GCC 12 makes several instructions of these conversions. maskz: its headers warn of the plain ones.
P2PFAST_INLINE VecW widen(const bf16* p) {
#if defined(__AVX512F__)
  return (VecW)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && !defined(P2PFAST_WIDE)
  return (VecW)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const VecHU*>(p), VecW);
#endif
}
P2PFAST_INLINE VecH narrow(VecW v) {
#if defined(__AVX512F__)
  return (VecH)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, VecH);
#endif
}

P2PFAST_INLINE Vec load(const bf16* p) { return (Vec)(widen(p) << 16); }

// The first `count` values, where memory ends before a whole vector.
template <class T>
Vec load_some(const T* p, int64_t count) {
  T values[kLanes] = {};
  std::memcpy(values, p, static_cast<size_t>(count) * sizeof(T));
  return load(values);
}

P2PFAST_INLINE VecH to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)v);
#else
  const VecW w = (VecW)v;
  const VecI is_nan = (VecI)(v != v);
  const VecW rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const VecW quiet = (w >> 16) | 0x40u;
  const VecW r = (rounded & ~(VecW)is_nan) | (quiet & (VecW)is_nan);
#if defined(__AVX2__) && !defined(P2PFAST_WIDE)
  const __m256i packed = _mm256_packus_epi32((__m256i)r, (__m256i)r);
  return (VecH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return narrow(r);
#endif
#endif
}
P2PFAST_INLINE void store(bf16* p, Vec v) { *reinterpret_cast<VecHU*>(p) = (VecHU)to_bf16(v); }

template <class T>
P2PFAST_INLINE void store_some(T* p, Vec v, int64_t count) {
  T values[kLanes];
  store(values, v);
  std::memcpy(p, values, static_cast<size_t>(count) * sizeof(T));
}

// stream() for bfloat16; the vectors of a cache line are written one after the other.
P2PFAST_INLINE void stream(bf16* p, Vec v) {
#if defined(P2PFAST_WIDE)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_bf16(v));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)to_bf16(v));
#else
  store(p, v);
#endif
}
template <class T>
inline constexpr int kLineVectors = 64 / static_cast<int>(sizeof(T)) / kLanes;  // that fill a cache line

// sum + a * b, where a pair of lanes is two products. As Intel defines the instruction: the second product is
// added first, every addition rounds to nearest. A product of two bfloat16 values is exact in float32, so
// that the emulation gives the same unless denormals (the instruction takes them for zero) or overflow come
// in.
P2PFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
P2PFAST_INLINE Vec multiply_add(Vec sum, VecPairs a, VecPairs b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vec)(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
  return sum + (Vec)(a << 16) * (Vec)(b << 16);
#endif
}
P2PFAST_INLINE VecPairs splat(Pair x) {
  uint32_t w;
  std::memcpy(&w, &x, 4);
  return w - (VecPairs){};
}
P2PFAST_INLINE VecPairs load(const Pair* p) { return *reinterpret_cast<const VecWU*>(p); }
P2PFAST_INLINE void store(Pair* p, VecPairs v) { *reinterpret_cast<VecWU*>(p) = v; }

P2PFAST_INLINE float to_float(float x) { return x; }
P2PFAST_INLINE float to_float(bf16 x) { return bf16_to_float(x); }
P2PFAST_INLINE void put(float* p, float x) { *p = x; }
P2PFAST_INLINE void put(bf16* p, float x) { *p = float_to_bf16(x); }

// NaN propagates (as torch.relu does): the comparison is false for a NaN, so v itself is taken.
P2PFAST_INLINE Vec leaky(Vec v, Vec slope) { return v < 0.0f ? v * slope : v; }

template <class T>
constexpr T min2(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max2(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace p2pfast::P2PFAST_LEVEL
