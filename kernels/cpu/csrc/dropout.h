// Skip dropout: the counter-based mask of kernels/philox.py, V blocks of four numbers at a time; or a
// mask that was drawn before.
#pragma once

#include <cmath>

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

#if defined(__AVX512F__) && PDARTS_WIDTH == 16
#define PDARTS_VECTORS_OF(type) __m512##type
#define PDARTS_OP(name) _mm512_##name
#elif defined(__AVX2__) && PDARTS_WIDTH == 8
#define PDARTS_VECTORS_OF(type) __m256##type
#define PDARTS_OP(name) _mm256_##name
// Lanes of odd numbers from the second.
PDARTS_INLINE __m256i odd_lanes_from(__m256i even, __m256i odd) {
  return _mm256_blend_epi32(even, odd, 0xAA);
}
#endif

#ifdef PDARTS_OP
typedef PDARTS_VECTORS_OF(i) Words;

// Both 32-bit halves of multiplier * word.
PDARTS_INLINE void multiply(uint32_t multiplier, Bits word, Bits& high, Bits& low) {
  const Words by = (Words)(Bits{} + multiplier);
  const Words even = PDARTS_OP(mul_epu32)((Words)word, by);
#if PDARTS_WIDTH == 16
  // Shuffles take another port than products, where shifts take the same one.
  constexpr _MM_PERM_ENUM kSwapped = static_cast<_MM_PERM_ENUM>(0xB1);
  const Words odd = _mm512_mul_epu32(_mm512_shuffle_epi32((Words)word, kSwapped), by);
  high = (Bits)_mm512_mask_shuffle_epi32(odd, 0x5555, even, kSwapped);
  low = (Bits)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, kSwapped);
#else
  const Words odd = PDARTS_OP(mul_epu32)(PDARTS_OP(srli_epi64)((Words)word, 32), by);
  high = (Bits)odd_lanes_from(PDARTS_OP(srli_epi64)(even, 32), odd);
  low = (Bits)odd_lanes_from(even, PDARTS_OP(slli_epi64)(odd, 32));
#endif
}

// Word l of the block in lane i is v[l][i]; puts them in the order of `block_in_lane`.
PDARTS_INLINE void put_in_order(Vec v[4]) {
  typedef PDARTS_VECTORS_OF(d) Pairs;
  typedef PDARTS_VECTORS_OF() Floats;
  const Pairs a = (Pairs)PDARTS_OP(unpacklo_ps)((Floats)v[0], (Floats)v[1]);
  const Pairs b = (Pairs)PDARTS_OP(unpackhi_ps)((Floats)v[0], (Floats)v[1]);
  const Pairs c = (Pairs)PDARTS_OP(unpacklo_ps)((Floats)v[2], (Floats)v[3]);
  const Pairs d = (Pairs)PDARTS_OP(unpackhi_ps)((Floats)v[2], (Floats)v[3]);
  v[0] = (Vec)PDARTS_OP(unpacklo_pd)(a, c);
  v[1] = (Vec)PDARTS_OP(unpackhi_pd)(a, c);
  v[2] = (Vec)PDARTS_OP(unpacklo_pd)(b, d);
  v[3] = (Vec)PDARTS_OP(unpackhi_pd)(b, d);
}
#undef PDARTS_VECTORS_OF
#undef PDARTS_OP
#else
PDARTS_INLINE void multiply(uint32_t multiplier, Bits word, Bits& high, Bits& low) {
  typedef uint64_t Wide __attribute__((vector_size(V * 8)));
  const Wide product = __builtin_convertvector(word, Wide) * static_cast<uint64_t>(multiplier);
  high = __builtin_convertvector(product >> 32, Bits);
  low = __builtin_convertvector(product, Bits);
}

PDARTS_INLINE void put_in_order(Vec v[4]) {
  Vec ordered[4];
  for (int i = 0; i < V; ++i)
    for (int word = 0; word < 4; ++word) ordered[i % 4][i / 4 * 4 + word] = v[word][i];
  for (int i = 0; i < 4; ++i) v[i] = ordered[i];
}
#endif

// Which of V blocks is computed in lane i, for `put_in_order`: words then come into order without leaving the
// 128 bits in which they are.
constexpr uint32_t block_in_lane(int i) { return static_cast<uint32_t>(V / 4 * (i % 4) + i / 4); }

// Blocks first .. first + V - 1 of a stream: block place(i) is in lane i, its word l is words[l][i].
template <class Place>
PDARTS_INLINE void philox(const int64_t* state, uint32_t stream, uint64_t first, Bits words[4], Place place) {
  Bits offsets;
  PDARTS_UNROLL
  for (int i = 0; i < V; ++i) offsets[i] = place(i);
  const uint32_t low_first = static_cast<uint32_t>(first);
  Bits c0 = offsets + low_first;
  // A comparison that holds is -1.
  Bits c1 = static_cast<uint32_t>(first >> 32) - (Bits)(c0 < low_first);
  Bits c2 = Bits{} + stream, c3 = Bits{} + static_cast<uint32_t>(state[1]);
  uint32_t k0 = static_cast<uint32_t>(state[0]);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(state[0]) >> 32);
  PDARTS_UNROLL
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
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
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

// One bit for each of V factors that is not 0.
PDARTS_INLINE uint64_t bits_of(Vec factors) {
#if defined(__AVX512F__) && PDARTS_WIDTH == 16
  return _mm512_cmp_ps_mask(factors, Vec{}, _CMP_NEQ_UQ);
#elif defined(__AVX2__) && PDARTS_WIDTH == 8
  return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(factors, Vec{}, _CMP_NEQ_UQ)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < V; ++i) bits |= static_cast<uint64_t>(factors[i] != 0.0f) << i;
  return bits;
#endif
}

// V factors again, from bit `element` on; `kept` is that of a bit of 1. In registers, or compilers would
// multiply in another order than with factors from memory.
PDARTS_INLINE Vec load_kept(const uint8_t* bits, int64_t element, Vec kept) {
  uint32_t word = 0;
  std::memcpy(&word, bits + element / 8, V < 8 ? 1 : V / 8);
  if (V < 8) word >>= element % 8;
#if defined(__AVX512F__) && PDARTS_WIDTH == 16
  return in_register((Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(word), kept));
#else
  Bits of_lane;
  PDARTS_UNROLL
  for (int i = 0; i < V; ++i) of_lane[i] = 1u << i;
  return in_register((word & of_lane) != Bits{} ? kept : Vec{});
#endif
}

PDARTS_INLINE Vec kept_factor(const Task& t) { return broadcast(1.0f / (1.0f - *t.dropout_rate)); }

// Factors 0 or 1 / (1 - p) of 4 V elements from block `block` of a branch's stream on.
PDARTS_INLINE void factors_of(const Task& t, const Branch& b, uint64_t block, Vec factors[4]) {
  const Vec p = broadcast(*t.dropout_rate), kept = kept_factor(t);
  Bits words[4];
  philox(t.dropout_state, static_cast<uint32_t>(b.stream), block, words, block_in_lane);
  PDARTS_UNROLL
  for (int l = 0; l < 4; ++l) {
    const Vec u = __builtin_convertvector((Integers)(words[l] >> 8), Vec) * 0x1p-24f;
    factors[l] = u >= p ? kept : Vec{};
  }
  put_in_order(factors);
}

// Factors of elements first .. first + count - 1, in NHWC order. Returns where they begin in `buffer`.
PDARTS_SHARED const float* dropout_factors(const Task& t, const Branch& b, int64_t first,
                                           int64_t count, float* buffer) {
  const uint64_t begin = static_cast<uint64_t>(first) / 4;
  const int64_t skip = first % 4;
  for (int64_t done = 0; done < skip + count; done += 4 * V) {
    Vec factors[4];
    factors_of(t, b, begin + static_cast<uint64_t>(done) / 4, factors);
    PDARTS_UNROLL
    for (int i = 0; i < 4; ++i) store(buffer + done + i * V, factors[i]);
  }
  return buffer + skip;
}

// Which of these elements have a factor, as bits; `first` and `count` are multiples of 8.
PDARTS_SHARED void dropout_bits(const Task& t, const Branch& b, int64_t first, int64_t count,
                                uint8_t* bits) {
#if defined(__BMI2__) && PDARTS_WIDTH == 16
  // The smallest number of 24 bits that is not below the rate.
  const double numbers = std::ceil(static_cast<double>(*t.dropout_rate) * 0x1p24);
  const __m512i least = _mm512_set1_epi32(static_cast<int32_t>(numbers));
#endif
  for (int64_t done = 0; done < count; done += 4 * V) {
    const uint64_t block = static_cast<uint64_t>(first + done) / 4;
    uint64_t all = 0;
#if defined(__BMI2__) && PDARTS_WIDTH == 16
    // Compared as integers and put in order as bits, in two thirds of the time.
    Bits words[4];
    philox(t.dropout_state, static_cast<uint32_t>(b.stream), block, words,
           [](int i) { return static_cast<uint32_t>(i); });
    PDARTS_UNROLL
    for (int l = 0; l < 4; ++l) {
      const uint64_t kept = _mm512_cmpge_epu32_mask((__m512i)(words[l] >> 8), least);
      all |= _pdep_u64(kept, 0x1111111111111111u << l);
    }
#else
    Vec factors[4];
    factors_of(t, b, block, factors);
    PDARTS_UNROLL
    for (int i = 0; i < 4; ++i) all |= bits_of(factors[i]) << (i * V);
#endif
    // Elements behind the last one may be another thread's.
    const int64_t size = (count - done) / 8;
    std::memcpy(bits + done / 8, &all, static_cast<size_t>(size < V / 2 ? size : V / 2));
  }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
