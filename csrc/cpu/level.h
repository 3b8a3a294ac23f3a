// Instruction-set levels: which ones this processor has, which one is active, and how a kernel is
// looked up. Kernel files under csrc/cpu/kernels are compiled once per level into a namespace of
// that name; callers go through the accessor that P2PFAST_PER_LEVEL declares.
#pragma once

namespace p2pfast {

enum class Level { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline constexpr int kLevels = 4;

const char* level_name(Level level);

// The highest level this processor and operating system support.
Level supported_level();

// The level in use: P2PFAST_CPU if set, else supported_level(). Throws std::runtime_error when
// P2PFAST_CPU names an unknown level or one the processor lacks.
Level active_level();

// Changes the active level (tests compare levels within one process). Same errors.
void set_active_level(const char* name);

// Whether kernels of a level were compiled. A build that emulates 16 lanes has no avx512, which would be the
// same code as avx512_bf16: this stands for it.
constexpr bool compiled(Level level) {
#if !defined(P2PFAST_X86)
  return level == Level::kBaseline;
#elif defined(P2PFAST_EMULATE_WIDE)
  return level != Level::kAvx512;
#else
  return level <= Level::kAvx512Bf16;
#endif
}

// Whether the active level has instructions for products of bfloat16 pairs. Others emulate them.
bool multiplies_pairs();

}  // namespace p2pfast

// Declares `extern const Type name` in every level's namespace and `p2pfast::name()`, which returns
// the table of the active level.
#ifdef P2PFAST_EMULATE_WIDE
#define P2PFAST_AVX512 avx512_bf16
#else
#define P2PFAST_AVX512 avx512
#endif
#ifdef P2PFAST_X86
#define P2PFAST_PER_LEVEL(Type, name)                                                                       \
  namespace baseline {                                                                                      \
  extern const Type name;                                                                                   \
  }                                                                                                         \
  namespace avx2 {                                                                                          \
  extern const Type name;                                                                                   \
  }                                                                                                         \
  namespace P2PFAST_AVX512 {                                                                                \
  extern const Type name;                                                                                   \
  }                                                                                                         \
  namespace avx512_bf16 {                                                                                   \
  extern const Type name;                                                                                   \
  }                                                                                                         \
  inline const Type& name() {                                                                               \
    const Type* const tables[] = {&baseline::name, &avx2::name, &P2PFAST_AVX512::name, &avx512_bf16::name}; \
    return *tables[static_cast<int>(active_level())];                                                       \
  }
#else
#define P2PFAST_PER_LEVEL(Type, name) \
  namespace baseline {                \
  extern const Type name;             \
  }                                   \
  inline const Type& name() { return baseline::name; }
#endif
