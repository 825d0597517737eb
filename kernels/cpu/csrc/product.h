// Small matrix products over a chunk of pixels, in registers.
//
// The tile is 6 pixels (or rows) x 2 vectors: 12 accumulators, 2 loads and 1 broadcast fill the
// 16 registers of AVX2. With the 32 registers of AVX-512 it is 8 x 2, and 16 x 1 where the matrix is
// one vector wide (C = 16): 16 sums hide the latency of a multiply-add, and 64 pixels are whole
// tiles.
//
// Operands are float, or bfloat16 where the processor multiplies it: a lane then holds two numbers
// that follow one another along the sum, and a step is a pair of them. tiles.h has `product`, `outer` and
// `left_side` of bfloat16 for AMX.
#pragma once

#include <type_traits>

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

#ifdef PDARTS_BF16
template <class T>
using Operand = T;  // of arrays of T
#else
template <class T>
using Operand = float;
#endif

// Numbers in a lane.
template <class E>
constexpr int64_t kPair = std::is_same<E, BFloat>::value ? 2 : 1;

PDARTS_INLINE Vec lane_everywhere(const float* p) { return broadcast(*p); }

PDARTS_INLINE Vec lanes(const float* p) { return load(p); }

PDARTS_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }

PDARTS_INLINE void put_number(float* p, float v) { *p = v; }

#ifdef PDARTS_BF16
typedef uint32_t UnalignedBits __attribute__((vector_size(V * 4), aligned(2), may_alias));

PDARTS_INLINE Bits lane_everywhere(const BFloat* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return Bits{} + pair;
}

PDARTS_INLINE Bits lanes(const BFloat* p) { return *reinterpret_cast<const UnalignedBits*>(p); }

PDARTS_INLINE Vec multiply_add(Vec sum, Bits a, Bits b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

PDARTS_INLINE void put_number(BFloat* p, float v) {
  BFloat rounded[V];
  store(rounded, broadcast(v));
  *p = rounded[0];
}
#endif

// A room of floats as one of operands.
template <class T>
PDARTS_INLINE Operand<T>* operands(float* room) {
  return reinterpret_cast<Operand<T>*>(room);
}

// Pixels that the arrays of an operand have: tiles of AMX are whole.
PDARTS_INLINE int64_t operand_pixels(int64_t pixels) {
#ifdef PDARTS_AMX
  return (pixels + 2 * V - 1) / (2 * V) * (2 * V);
#else
  return pixels;
#endif
}

// Room, in floats, for the rows of an operand and for a side of `outer` made of them.
PDARTS_INLINE int64_t operand_floats(int64_t pixels, int64_t depth) {
  return (operand_pixels(pixels) + 1) * depth + kSlack;
}

// Rows [pixels, columns] in the order in which `outer` sums them: pixel by pixel.
PDARTS_INLINE const float* right_side(float* rows, int64_t, int64_t) { return rows; }

#ifdef PDARTS_BF16
// Numbers of two pixels, one behind the other, in turns: lane i has channel i of both.
PDARTS_INLINE __m512i in_turns(__m512i both) {
  const __m512i places =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                       20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(places, both);
}

PDARTS_INLINE __m256i channels_of(const BFloat* pixel) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixel));
}

PDARTS_INLINE __m512i join(__m256i first, __m256i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// Channels c to c + V of pixels p and p + 1; zero for pixels that there are not.
PDARTS_INLINE Bits pixel_pair(const BFloat* rows, int64_t p, int64_t pixels, int64_t columns,
                              int64_t c) {
  const auto numbers = [&](int64_t pixel) {
    return pixel < pixels ? channels_of(rows + pixel * columns + c) : _mm256_setzero_si256();
  };
  return (Bits)in_turns(join(numbers(p), numbers(p + 1)));
}

// Two pixels a lane, into the room behind the rows.
PDARTS_INLINE const BFloat* right_side(BFloat* rows, int64_t pixels, int64_t columns) {
  const int64_t padded = operand_pixels(pixels);
  BFloat* pairs = rows + padded * columns;
  for (int64_t p = 0; p < padded; p += 2)
    for (int64_t c = 0; c < columns; c += V)
      *reinterpret_cast<UnalignedBits*>(pairs + p * columns + 2 * c) =
          pixel_pair(rows, p, pixels, columns, c);
  return pairs;
}
#endif

// The left side of `outer` from its rows.
template <class E>
PDARTS_INLINE const E* left_side(E* rows, int64_t pixels, int64_t columns) {
  return right_side(rows, pixels, columns);
}

template <int NV>
constexpr int kTileRows = kManyRegisters ? 16 / NV : 6;

// Packs B [K, N] into panels of 2 V columns (the last may have V): panel, k, column.
// B is read as b[k * k_stride + n * n_stride].
template <class E>
PDARTS_INLINE void pack_panels(const float* b, int64_t k_stride, int64_t n_stride, int64_t depth,
                               int64_t columns, E* packed) {
  for (int64_t n = 0; n < columns; n += 2 * V) {
    const int64_t width = min_of(2 * V, columns - n);
    for (int64_t k = 0; k < depth; k += kPair<E>)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t q = 0; q < kPair<E>; ++q)
          put_number(packed++, b[(k + q) * k_stride + (n + i) * n_stride]);
  }
}

template <int R, int NV, class E, class Put>
PDARTS_INLINE void product_tile(const E* a, int64_t a_stride, const E* b, int64_t depth,
                                int64_t pixel, int64_t block, Put put) {
  Vec acc[R][NV];
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec{};
  }
  for (int64_t k = 0; k < depth; k += kPair<E>) {
    decltype(lanes(b)) bk[NV];
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) bk[j] = lanes(b + (k * NV + j * kPair<E>) * V);
    const E* row = a + k;
    PDARTS_UNROLL
    for (int r = 0; r < R; ++r) {
      if (r % 4 == 0) row = unrelated(r ? row + 4 * a_stride : row);
      const auto ar = lane_everywhere(row + r % 4 * a_stride);
      PDARTS_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] = multiply_add(acc[r][j], ar, bk[j]);
    }
  }
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) put(pixel + r, block + j, acc[r][j]);
  }
}

// The last R or fewer pixels, as tiles of R, R / 2, ... 1.
template <int R, int NV, class E, class Put>
PDARTS_INLINE void product_rest(const E* a, int64_t a_stride, int64_t pixels, const E* b,
                                int64_t depth, int64_t pixel, int64_t block, Put put) {
  if (pixels >= R) {
    product_tile<R, NV>(a, a_stride, b, depth, pixel, block, put);
    a += R * a_stride;
    pixel += R;
    pixels -= R;
  }
  if constexpr (R > 1)
    product_rest<R / 2, NV>(a, a_stride, pixels, b, depth, pixel, block, put);
}

template <int NV, class E, class Put>
PDARTS_INLINE void product_panel(const E* a, int64_t a_stride, int64_t pixels, const E* b,
                                 int64_t depth, int64_t block, Put put) {
  constexpr int kRows = kTileRows<NV>;
  int64_t p = 0;
  for (; p + kRows <= pixels; p += kRows)
    product_tile<kRows, NV>(a + p * a_stride, a_stride, b, depth, p, block, put);
  product_rest<kRows >= 16 ? 8 : 4, NV>(a + p * a_stride, a_stride, pixels - p, b, depth, p, block,
                                        put);
}

// put(pixel, channel block, sum_k a[pixel][k] B[k]) for a [pixels, depth] and packed B.
template <class E, class Put>
PDARTS_INLINE void product(const E* a, int64_t a_stride, int64_t pixels, int64_t depth,
                           const E* packed, int64_t columns, Put put) {
  int64_t n = 0;
  for (; n + 2 * V <= columns; n += 2 * V, packed += depth * 2 * V)
    product_panel<2>(a, a_stride, pixels, packed, depth, n / V, put);
  if (n < columns) product_panel<1>(a, a_stride, pixels, packed, depth, n / V, put);
}

// out [operand_pixels, columns] = a times B. Asks `ahead` for as many pixels.
template <class E, class Out, class A>
PDARTS_INLINE void product_rows(const E* a, int64_t a_stride, int64_t pixels, int64_t depth,
                                const E* packed, int64_t columns, Out* out, const A& ahead) {
  product(a, a_stride, pixels, depth, packed, columns, [&](int64_t p, int64_t block, Vec v) {
    ahead.ask(p, block);
    store(out + p * columns + block * V, v);
  });
}

// `a` and `b` as left_side and right_side give them.
template <int R, int NV, class E>
PDARTS_INLINE void outer_tile(const E* a, int64_t a_stride, const E* b, int64_t b_stride,
                              int64_t pixels, float* out, int64_t out_stride, bool begins) {
  Vec acc[R][NV];
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec{};
  }
  for (int64_t p = 0; p < pixels; p += kPair<E>) {
    decltype(lanes(b)) bp[NV];
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) bp[j] = lanes(b + p * b_stride + j * V * kPair<E>);
    PDARTS_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto ar = lane_everywhere(a + p * a_stride + r * kPair<E>);
      PDARTS_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] = multiply_add(acc[r][j], ar, bp[j]);
    }
  }
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* o = out + r * out_stride + j * V;
      store(o, begins ? acc[r][j] : load(o) + acc[r][j]);
    }
  }
}

template <int NV, class E>
PDARTS_INLINE void outer_panel(const E* a, int64_t rows, const E* b, int64_t b_stride,
                               int64_t pixels, float* out, int64_t out_stride, bool begins) {
  constexpr int kRows = kTileRows<NV>;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    outer_tile<kRows, NV>(a + i * kPair<E>, rows, b, b_stride, pixels,
                        out + i * out_stride, out_stride, begins);
  if (kRows > 8 && i + 8 <= rows) {
    outer_tile<8, NV>(a + i * kPair<E>, rows, b, b_stride, pixels,
                        out + i * out_stride, out_stride, begins);
    i += 8;
  }
  if (i + 4 <= rows) {
    outer_tile<4, NV>(a + i * kPair<E>, rows, b, b_stride, pixels,
                        out + i * out_stride, out_stride, begins);
    i += 4;
  }
  for (; i < rows; i += 2)
    outer_tile<2, NV>(a + i * kPair<E>, rows, b, b_stride, pixels,
                        out + i * out_stride, out_stride, begins);
}

// out [rows, columns] = or, unless it begins, += sum over pixels of a[pixel][row] b[pixel][column]; rows is
// even. `a` and `b` as left_side and right_side give them.
template <class E>
PDARTS_INLINE void outer(const E* a, int64_t rows, const E* b, int64_t columns, int64_t pixels,
                         float* out, bool begins) {
  int64_t n = 0;
  for (; n + 2 * V <= columns; n += 2 * V)
    outer_panel<2>(a, rows, b + n * kPair<E>, columns, pixels, out + n, columns, begins);
  if (n < columns) outer_panel<1>(a, rows, b + n * kPair<E>, columns, pixels, out + n, columns, begins);
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
