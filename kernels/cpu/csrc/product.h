// Small matrix products over a chunk of pixels, in registers.
//
// The tile is 6 pixels (or rows) x 2 vectors: 12 accumulators, 2 loads and 1 broadcast fill the
// 16 registers of AVX2. With the 32 registers of AVX-512 it is 8 x 2, and 16 x 1 where the matrix is
// one vector wide (C = 16): 16 sums hide the latency of a multiply-add, and 64 pixels are whole
// tiles. A matrix unit (AVX512-BF16, AMX) would replace `product` and `outer`.
#pragma once

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

template <int NV>
constexpr int kTileRows = kManyRegisters ? 16 / NV : 6;

// Packs B [K, N] into panels of 2 V columns (the last may have V): panel, k, column.
// B is read as b[k * k_stride + n * n_stride].
PDARTS_INLINE void pack_panels(const float* b, int64_t k_stride, int64_t n_stride, int64_t depth,
                               int64_t columns, float* packed) {
  for (int64_t n = 0; n < columns; n += 2 * V) {
    const int64_t width = min_of(2 * V, columns - n);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < width; ++i) *packed++ = b[k * k_stride + (n + i) * n_stride];
  }
}

template <int R, int NV, class Put>
PDARTS_INLINE void product_tile(const float* a, int64_t a_stride, const float* b, int64_t depth,
                                int64_t pixel, int64_t block, Put put) {
  Vec acc[R][NV];
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec bk[NV];
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) bk[j] = load(b + (k * NV + j) * V);
    PDARTS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec ar = broadcast(a[r * a_stride + k]);
      PDARTS_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] += ar * bk[j];
    }
  }
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) put(pixel + r, block + j, acc[r][j]);
  }
}

// The last R or fewer pixels, as tiles of R, R / 2, ... 1.
template <int R, int NV, class Put>
PDARTS_INLINE void product_rest(const float* a, int64_t a_stride, int64_t pixels, const float* b,
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

template <int NV, class Put>
PDARTS_INLINE void product_panel(const float* a, int64_t a_stride, int64_t pixels, const float* b,
                                 int64_t depth, int64_t block, Put put) {
  constexpr int kRows = kTileRows<NV>;
  int64_t p = 0;
  for (; p + kRows <= pixels; p += kRows)
    product_tile<kRows, NV>(a + p * a_stride, a_stride, b, depth, p, block, put);
  product_rest<kRows >= 16 ? 8 : 4, NV>(a + p * a_stride, a_stride, pixels - p, b, depth, p, block,
                                        put);
}

// put(pixel, channel block, sum_k a[pixel][k] B[k]) for a [pixels, depth] and packed B.
template <class Put>
PDARTS_INLINE void product(const float* a, int64_t a_stride, int64_t pixels, int64_t depth,
                           const float* packed, int64_t columns, Put put) {
  int64_t n = 0;
  for (; n + 2 * V <= columns; n += 2 * V, packed += depth * 2 * V)
    product_panel<2>(a, a_stride, pixels, packed, depth, n / V, put);
  if (n < columns) product_panel<1>(a, a_stride, pixels, packed, depth, n / V, put);
}

template <int R, int NV>
PDARTS_INLINE void outer_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              int64_t pixels, float* out, int64_t out_stride) {
  Vec acc[R][NV];
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec{};
  }
  for (int64_t p = 0; p < pixels; ++p) {
    Vec bp[NV];
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) bp[j] = load(b + p * b_stride + j * V);
    PDARTS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec ar = broadcast(a[p * a_stride + r]);
      PDARTS_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] += ar * bp[j];
    }
  }
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* o = out + r * out_stride + j * V;
      store(o, load(o) + acc[r][j]);
    }
  }
}

template <int NV>
PDARTS_INLINE void outer_panel(const float* a, int64_t rows, const float* b, int64_t b_stride,
                               int64_t pixels, float* out, int64_t out_stride) {
  constexpr int kRows = kTileRows<NV>;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    outer_tile<kRows, NV>(a + i, rows, b, b_stride, pixels, out + i * out_stride, out_stride);
  if (kRows > 8 && i + 8 <= rows) {
    outer_tile<8, NV>(a + i, rows, b, b_stride, pixels, out + i * out_stride, out_stride);
    i += 8;
  }
  if (i + 4 <= rows) {
    outer_tile<4, NV>(a + i, rows, b, b_stride, pixels, out + i * out_stride, out_stride);
    i += 4;
  }
  for (; i < rows; i += 2)
    outer_tile<2, NV>(a + i, rows, b, b_stride, pixels, out + i * out_stride, out_stride);
}

// out [rows, columns] += sum over pixels of a[pixel][row] b[pixel][column]; rows is even.
PDARTS_INLINE void outer(const float* a, int64_t rows, const float* b, int64_t columns,
                         int64_t pixels, float* out) {
  int64_t n = 0;
  for (; n + 2 * V <= columns; n += 2 * V)
    outer_panel<2>(a, rows, b + n, columns, pixels, out + n, columns);
  if (n < columns) outer_panel<1>(a, rows, b + n, columns, pixels, out + n, columns);
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
