// The products of product.h on the matrix unit of AMX: a tile register holds 16 rows of 64 bytes, and one
// instruction adds the product of 16x32 by 32x16 bfloat16 numbers to 16x16 float32 sums.
//
// Rows of `a` and packed panels of weights are tiles as they lie in memory: a row of a panel's tile is a
// pair of the sum's terms for 16 columns. A sum over pixels (`outer`) needs its left side transposed.
// Channels are whole vectors, so a sum has a multiple of 16 terms: 32 at a time, and 16 at the end.
#pragma once

#include "product.h"

namespace pdarts {
namespace PDARTS_VARIANT {

#ifdef PDARTS_AMX

// Tile registers 0 to 3 are sums.
enum Tile { kLeft = 4, kRight = 5, kLeftHalf = 6, kRightHalf = 7 };

constexpr int64_t kTileSide = 16;   // rows, and columns of float32 sums
constexpr int64_t kTileDepth = 32;  // terms of a sum
constexpr int64_t kSums = 4;        // tiles that share a right side

// Gives the calling thread its tile registers while it lives.
class Tiles {
 public:
  Tiles() { configure(32, 8); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }

  // Sizes of kLeftHalf and kRightHalf; all registers lose what they have.
  static void configure(uint16_t left_bytes, uint8_t right_rows) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    config.row_bytes[kLeftHalf] = left_bytes;
    config.rows[kRightHalf] = right_rows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
};

// Makes all tile registers whole while it lives.
class WholeTiles {
 public:
  WholeTiles() { Tiles::configure(64, 16); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;
  ~WholeTiles() { Tiles::configure(32, 8); }
};

// `stride` is in bytes. The compiler does not know what these read and write, hence "memory".
template <int Which>
PDARTS_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(Which) : "memory");
}

template <int Which>
PDARTS_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(Which) : "memory");
}

template <int Which>
PDARTS_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Which));
}

template <int Sum, int Left, int Right>
PDARTS_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(Right), "i"(Left), "i"(Sum));
}

// f(0) to f(kSums - 1) as constants, the first `count` of them.
template <class F>
PDARTS_INLINE void each_sum(int64_t count, F f) {
  f(std::integral_constant<int, 0>());
  if (count > 1) f(std::integral_constant<int, 1>());
  if (count > 2) f(std::integral_constant<int, 2>());
  if (count > 3) f(std::integral_constant<int, 3>());
}

// The first `count` sums += left times right. Rows of the left side are `left_stride` numbers apart, pairs
// of rows of the right side `right_stride`.
PDARTS_INLINE void add_products(int64_t count, const BFloat* left, int64_t left_stride,
                                const BFloat* right, int64_t right_stride, int64_t depth) {
  constexpr int64_t kSize = sizeof(BFloat);
  int64_t k = 0;
  for (; k + kTileDepth <= depth; k += kTileDepth) {
    load_tile<kRight>(right + k / 2 * right_stride, right_stride * kSize);
    each_sum(count, [&](auto i) PDARTS_LAMBDA {
      load_tile<kLeft>(left + i.value * kTileSide * left_stride + k, left_stride * kSize);
      multiply_tiles<i.value, kLeft, kRight>();
    });
  }
  if (k == depth) return;
  load_tile<kRightHalf>(right + k / 2 * right_stride, right_stride * kSize);
  each_sum(count, [&](auto i) PDARTS_LAMBDA {
    load_tile<kLeftHalf>(left + i.value * kTileSide * left_stride + k, left_stride * kSize);
    multiply_tiles<i.value, kLeftHalf, kRightHalf>();
  });
}

// The tiles of a times B, up to kSums of them one below the other at a time: each is stored from place(its
// first pixel, first column) on, rows `place_bytes` apart, then done(first pixel, rows, first column).
// Tiles may read rows of `a` behind the last pixel, see `operand_pixels`.
template <class Place, class Done>
PDARTS_INLINE void product_tiles(const BFloat* a, int64_t a_stride, int64_t pixels, int64_t depth,
                                 const BFloat* packed, int64_t columns, int64_t place_bytes, Place place,
                                 Done done) {
  for (int64_t n = 0; n < columns; n += V) {
    const int64_t panel = n / (2 * V) * (2 * V), width = min_of(2 * V, columns - panel);
    const BFloat* right = packed + panel * depth + (n - panel) * 2;
    for (int64_t pixel = 0; pixel < pixels; pixel += kSums * kTileSide) {
      const int64_t rows = min_of(kSums * kTileSide, pixels - pixel);
      const int64_t count = (rows + kTileSide - 1) / kTileSide;
      each_sum(count, [&](auto i) PDARTS_LAMBDA { clear_tile<i.value>(); });
      add_products(count, a + pixel * a_stride, a_stride, right, 2 * width, depth);
      each_sum(count, [&](auto i) PDARTS_LAMBDA {
        store_tile<i.value>(place(pixel + i.value * kTileSide, n), place_bytes);
      });
      done(pixel, rows, n);
    }
  }
}

// As in product.h.
template <class Put>
PDARTS_INLINE void product(const BFloat* a, int64_t a_stride, int64_t pixels, int64_t depth,
                           const BFloat* packed, int64_t columns, Put put) {
  alignas(64) float sums[kSums * kTileSide][kTileSide];
  product_tiles(
      a, a_stride, pixels, depth, packed, columns, sizeof sums[0],
      [&](int64_t pixel, int64_t) PDARTS_LAMBDA { return sums[pixel % (kSums * kTileSide)]; },
      [&](int64_t pixel, int64_t rows, int64_t n) PDARTS_LAMBDA {
        for (int64_t row = 0; row < rows; ++row) put(pixel + row, n / V, load(sums[row]));
      });
}

// As in product.h.
template <class A>
PDARTS_INLINE void product_rows(const BFloat* a, int64_t a_stride, int64_t pixels, int64_t depth,
                                const BFloat* packed, int64_t columns, float* out, const A& ahead) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t block = 0; block < columns / V; ++block) ahead.ask(p, block);
  product_tiles(
      a, a_stride, pixels, depth, packed, columns, columns * static_cast<int64_t>(sizeof(float)),
      [&](int64_t pixel, int64_t n) PDARTS_LAMBDA { return out + pixel * columns + n; },
      [](int64_t, int64_t, int64_t) PDARTS_LAMBDA {});
}

// Row i of `out` is column i of `in`: 16 x 16 numbers of 32 bits.
PDARTS_INLINE void transpose(const __m512i* in, __m512i* out) {
  // Swapping the halves of two rows that differ in one bit of their number, for each of its four bits.
  __m512i from[kTileSide], to[kTileSide];
  for (int64_t i = 0; i < kTileSide; ++i) from[i] = in[i];
  PDARTS_UNROLL
  for (int bit = 1; bit < kTileSide; bit *= 2) {
    alignas(64) int32_t first[kTileSide], second[kTileSide];
    PDARTS_UNROLL
    for (int i = 0; i < kTileSide; ++i) {
      first[i] = i & bit ? kTileSide + i - bit : i;
      second[i] = i & bit ? kTileSide + i : i + bit;
    }
    const __m512i low = _mm512_load_si512(first), high = _mm512_load_si512(second);
    PDARTS_UNROLL
    for (int i = 0; i < kTileSide; ++i) {
      if (i & bit) continue;
      to[i] = _mm512_permutex2var_epi32(from[i], low, from[i + bit]);
      to[i + bit] = _mm512_permutex2var_epi32(from[i], high, from[i + bit]);
    }
    PDARTS_UNROLL
    for (int i = 0; i < kTileSide; ++i) from[i] = to[i];
  }
  PDARTS_UNROLL
  for (int i = 0; i < kTileSide; ++i) out[i] = from[i];
}

// [columns, operand_pixels] = rows [pixels, columns] transposed, zero behind the last pixel, in the room
// behind the rows.
PDARTS_INLINE const BFloat* left_side(BFloat* rows, int64_t pixels, int64_t columns) {
  const int64_t padded = operand_pixels(pixels);
  BFloat* channels = rows + padded * columns;
  for (int64_t p = 0; p < padded; p += 2 * V)
    for (int64_t c = 0; c < columns; c += V) {
      __m512i pairs[V], turned[V];
      PDARTS_UNROLL
      for (int i = 0; i < V; ++i) pairs[i] = (__m512i)pixel_pair(rows, p + 2 * i, pixels, columns, c);
      transpose(pairs, turned);
      PDARTS_UNROLL
      for (int i = 0; i < V; ++i) store(channels + (c + i) * padded + p, turned[i]);
    }
  return channels;
}

// out [rows, columns] = or, unless it begins, += sum over pixels of a[row][pixel] b[pixel][column].
PDARTS_INLINE void outer(const BFloat* a, int64_t rows, const BFloat* b, int64_t columns,
                         int64_t pixels, float* out, bool begins) {
  const int64_t padded = operand_pixels(pixels), row_bytes = columns * 4;
  for (int64_t n = 0; n < columns; n += V)
    for (int64_t row = 0; row < rows; row += kSums * kTileSide) {
      const int64_t count = min_of(kSums, (rows - row) / kTileSide);
      float* sums = out + row * columns + n;
      each_sum(count, [&](auto i) PDARTS_LAMBDA {
        if (begins) clear_tile<i.value>();
        else load_tile<i.value>(sums + i.value * kTileSide * columns, row_bytes);
      });
      add_products(count, a + row * padded, padded, b + 2 * n, 2 * columns, padded);
      each_sum(count, [&](auto i) PDARTS_LAMBDA {
        store_tile<i.value>(sums + i.value * kTileSide * columns, row_bytes);
      });
    }
}

#else

class Tiles {};

#endif  // PDARTS_AMX

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
