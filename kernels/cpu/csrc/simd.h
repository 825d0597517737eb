// Vectors of PDARTS_WIDTH floats by the GCC/Clang vector extension: one source for every processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "abi.h"

#define PDARTS_UNROLL _Pragma("GCC unroll 64")
#define PDARTS_INLINE static inline __attribute__((always_inline))
#define PDARTS_INLINE_METHOD inline __attribute__((always_inline))
// A lambda that takes part in an unrolled loop.
#define PDARTS_LAMBDA __attribute__((always_inline))
// Compiled once for all storage types and callers: these unroll into thousands of instructions.
#define PDARTS_SHARED [[maybe_unused]] static __attribute__((noinline))

// Products of bfloat16 numbers with float32 sums, two at a time.
#if defined(__AVX512BF16__) && PDARTS_WIDTH == 16
#define PDARTS_BF16 1
#endif

// The same on tiles of 16 rows.
#if defined(__AMX_BF16__) && defined(PDARTS_BF16)
#define PDARTS_AMX 1
#endif

namespace pdarts {

struct BFloat {
  uint16_t bits;
};

namespace PDARTS_VARIANT {

constexpr int V = PDARTS_WIDTH;

// AVX-512 has 32 vector registers, everything else is written for 16.
constexpr bool kManyRegisters = V == 16;

typedef float Vec __attribute__((vector_size(V * 4)));
// These alias their own numbers alone: a store that may alias anything makes the compiler load what a loop
// reads of a task anew after every number.
typedef float UnalignedVec __attribute__((vector_size(V * 4), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(V * 4)));
typedef uint16_t Half __attribute__((vector_size(V * 2)));
typedef uint16_t UnalignedHalf __attribute__((vector_size(V * 2), aligned(2)));

#ifdef PDARTS_BF16
typedef uint16_t UnalignedLine __attribute__((vector_size(64), aligned(2)));
#endif

// A vector in memory of any type.
typedef float AnyVec __attribute__((vector_size(V * 4), aligned(1), may_alias));

// A number as a type.
template <int N>
struct Int {
  static constexpr int value = N;
};

PDARTS_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

PDARTS_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

PDARTS_INLINE Vec load(const BFloat* p) {
#if defined(__AVX512BW__) && PDARTS_WIDTH == 16
  // Each number into the upper half of its lane in one step: to widen and to shift are two.
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i places = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6,
                                          0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, places, twice);
#endif
  const Half h = *reinterpret_cast<const UnalignedHalf*>(p);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

// Rounds to nearest even; NaN stays NaN.
PDARTS_INLINE void store(BFloat* p, Vec v) {
#ifdef PDARTS_BF16
  *reinterpret_cast<UnalignedHalf*>(p) = (Half)_mm512_cvtneps_pbh(v);
#else
  Bits w = (Bits)v;
  w += 0x7fffu + ((w >> 16) & 1u);
  w = v == v ? w : Bits{} + 0x7fc00000u;
  *reinterpret_cast<UnalignedHalf*>(p) = __builtin_convertvector(w >> 16, Half);
#endif
}

#ifdef PDARTS_BF16
// Two vectors, or one, that are rounded.
PDARTS_INLINE void store(BFloat* p, __m512i line) {
  *reinterpret_cast<UnalignedLine*>(p) = (UnalignedLine)line;
}

PDARTS_INLINE void store(BFloat* p, __m256i half) { *reinterpret_cast<UnalignedHalf*>(p) = (Half)half; }
#endif

// What load gives back after store.
template <class T>
PDARTS_INLINE Vec as_stored(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T kept[V];
  store(kept, v);
  return load(kept);
}

// The address without what the compiler knows about it. It would keep one for each of many rows or pixels; where
// these are more than there are registers, it loads the address before every number (a fifth of the rate of products
// at C = 16).
template <class T>
PDARTS_INLINE T* unrelated(T* p) {
  asm("" : "+r"(p));
  return p;
}

// The value in a register: otherwise the compiler may load it anew for every use, and a load for
// every multiply-add is as many as the processor can do.
PDARTS_INLINE Vec in_register(Vec v) {
#if defined(__AVX512F__) && PDARTS_WIDTH == 16
  asm("" : "+v"(v));
#elif defined(__AVX__) && PDARTS_WIDTH == 8
  asm("" : "+x"(v));
#endif
  return v;
}

// x - 0 is x for every x, so this is a plain broadcast.
PDARTS_INLINE Vec broadcast(float s) { return s - Vec{}; }

// a > b ? a : b, so b where either is NaN.
PDARTS_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__) && PDARTS_WIDTH == 16
  return _mm512_max_ps(a, b);
#elif defined(__AVX__) && PDARTS_WIDTH == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// NaN passes through, as in torch.
PDARTS_INLINE Vec relu(Vec v) { return maximum(Vec{}, v); }

PDARTS_INLINE Vec masked(Vec value, Vec by) { return by > Vec{} ? value : Vec{}; }

// Past the caches: a plain store first reads the line that it overwrites. `p` is aligned to the
// vector; `end_streams` comes before another thread reads.
PDARTS_INLINE void stream_any(void* p, Vec v) {
#if defined(__AVX512F__) && PDARTS_WIDTH == 16
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX__) && PDARTS_WIDTH == 8
  _mm256_stream_ps(static_cast<float*>(p), v);
#else
  *static_cast<AnyVec*>(p) = v;
#endif
}

PDARTS_INLINE void stream(float* p, Vec v) { stream_any(p, v); }

// A vector of bfloat16 is half a line, and half a line is slow to write past the caches.
PDARTS_INLINE void stream(BFloat* p, Vec v) { store(p, v); }

// Whether `stream` writes past the caches; `write_out` of scratch.h does for all types.
template <class T>
constexpr bool kWholeLines = sizeof(T) == sizeof(float);

// Whether `stream` may write from p on, and at whole vectors from there.
PDARTS_INLINE bool can_stream(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % (V * sizeof(float)) == 0;
}

// f(i, chain) for i < count: sums alternate between chains, as one waits for its last addition.
template <int kChains, class F>
PDARTS_INLINE void in_chains(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    PDARTS_UNROLL
    for (int chain = 0; chain < kChains; ++chain) f(i + chain, chain);
  }
  for (; i < count; ++i) f(i, 0);
}

PDARTS_INLINE void end_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
