// Skip dropout: the counter-based mask of kernels/philox.py, V blocks of four numbers at a time; or a
// mask that was drawn before.
#pragma once

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

typedef uint64_t Wide __attribute__((vector_size(V * 8)));

// Both 32-bit halves of multiplier * word.
PDARTS_INLINE void multiply(uint64_t multiplier, Bits word, Bits& high, Bits& low) {
  const Wide product = __builtin_convertvector(word, Wide) * multiplier;
  high = __builtin_convertvector(product >> 32, Bits);
  low = __builtin_convertvector(product, Bits);
}

// Blocks first .. first + V - 1 of a stream: words[4][V].
PDARTS_INLINE void philox(const int64_t* state, uint32_t stream, uint64_t first,
                          uint32_t words[4][V]) {
  Bits c0, c1;
  for (int i = 0; i < V; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>((first + i) >> 32);
  }
  Bits c2 = Bits{} + stream, c3 = Bits{} + static_cast<uint32_t>(state[1]);
  uint32_t k0 = static_cast<uint32_t>(state[0]);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(state[0]) >> 32);
  for (int round = 0; round < 10; ++round) {
    Bits high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, high0, low0);
    multiply(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Bits all[4] = {c0, c1, c2, c3};
  std::memcpy(words, all, sizeof all);
}

typedef uint8_t Bytes __attribute__((vector_size(V)));
typedef int32_t Integers __attribute__((vector_size(V * 4)));

// V elements of a mask of 0 and 1. GCC 12 converts vectors of bytes element by element.
PDARTS_INLINE Vec load_mask(const uint8_t* p) {
#if defined(__AVX512F__) && PDARTS_WIDTH == 16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__) && PDARTS_WIDTH == 8
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Vec);
#endif
}

// Room that dropout_factors needs for `count` elements.
PDARTS_INLINE int64_t dropout_floats(int64_t count) { return count + 8 * V; }

// Factors 0 or 1 / (1 - p) of elements first .. first + count - 1, in NHWC order. Returns where
// they begin in `buffer`.
PDARTS_INLINE const float* dropout_factors(const Task& t, const Branch& b, int64_t first,
                                           int64_t count, float* buffer) {
  const float p = *t.dropout_rate, kept = 1.0f / (1.0f - p);
  const uint64_t begin = static_cast<uint64_t>(first) / 4;
  const int64_t skip = first % 4;
  for (int64_t done = 0; done < skip + count; done += 4 * V) {
    uint32_t words[4][V];
    philox(t.dropout_state, static_cast<uint32_t>(b.stream), begin + done / 4, words);
    for (int i = 0; i < V; ++i)
      for (int lane = 0; lane < 4; ++lane) {
        const float u = static_cast<float>(words[lane][i] >> 8) * 0x1p-24f;
        buffer[done + i * 4 + lane] = u >= p ? kept : 0.0f;
      }
  }
  return buffer + skip;
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
