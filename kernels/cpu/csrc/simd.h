// Vectors of PDARTS_WIDTH floats by the GCC/Clang vector extension: one source for every processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

#define PDARTS_UNROLL _Pragma("GCC unroll 64")
#define PDARTS_INLINE static inline __attribute__((always_inline))

namespace pdarts {
namespace PDARTS_VARIANT {

constexpr int V = PDARTS_WIDTH;

typedef float Vec __attribute__((vector_size(V * 4)));
typedef float UnalignedVec __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(V * 4)));
typedef uint16_t Half __attribute__((vector_size(V * 2)));
typedef uint16_t UnalignedHalf __attribute__((vector_size(V * 2), aligned(2), may_alias));

struct BFloat {
  uint16_t bits;
};

PDARTS_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

PDARTS_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

PDARTS_INLINE Vec load(const BFloat* p) {
  const Half h = *reinterpret_cast<const UnalignedHalf*>(p);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

// Rounds to nearest even; NaN stays NaN.
PDARTS_INLINE void store(BFloat* p, Vec v) {
  Bits w = (Bits)v;
  w += 0x7fffu + ((w >> 16) & 1u);
  w = v == v ? w : Bits{} + 0x7fc00000u;
  *reinterpret_cast<UnalignedHalf*>(p) = __builtin_convertvector(w >> 16, Half);
}

// x - 0 is x for every x, so this is a plain broadcast.
PDARTS_INLINE Vec broadcast(float s) { return s - Vec{}; }

// NaN passes through, as in torch.
PDARTS_INLINE Vec relu(Vec v) { return Vec{} > v ? Vec{} : v; }

PDARTS_INLINE Vec masked(Vec value, Vec by) { return by > Vec{} ? value : Vec{}; }

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
