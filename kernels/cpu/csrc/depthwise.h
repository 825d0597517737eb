// Depthwise convolution of one image in registers: forward, transposed, and of the weights. stencils.cpp compiles
// it, and stencils.h has what others call.
//
// Weights are packed as stencils.h says. Along a row, one load of the input feeds up to K outputs,
// so the loops are bound by multiply-adds and not by loads.
#pragma once

#include "lines.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Output columns computed together: 8 accumulators, 5 weights and 1 input fit 16 registers. A
// multiply-add takes four cycles and two begin in each: 8 sums just keep both units busy, 16 do.
constexpr int kColumns = 8;
constexpr int kWideColumns = kManyRegisters ? 16 : kColumns;

// Where a convolution writes: rows of a chunk [pixels, channels] ...
template <class E>
struct ChunkOutputs {
  using Number = E;
  E* first;
  int64_t pixel_step, row_step;
  static constexpr int64_t block_step = V;
  static constexpr bool adds = false;
};

// ... or a plane, of which it may be added to what is there.
struct PlaneOutputs {
  using Number = float;
  float* first;
  int64_t row_step, block_step;
  bool adds;
  static constexpr int64_t pixel_step = V;
};

// acc[r][o] += N outputs of R rows that are D rows apart, so that they share what they read. `p` points at the first
// tap of the first output.
template <int K, int D, int S, int R, int N>
PDARTS_INLINE void depthwise_block(const float* p, int64_t row_stride, const float* w, Vec (*acc)[N]) {
  static_assert(R == 1 || (R == 2 && S == 1), "rows of stride 2 share few");
  // Taps are loaded here, not once for all rows of an image: there are more than registers.
  asm volatile("" : "+r"(w));
  // Input row i meets row i - r of the taps of output row r, for rows [begin, end) of these.
  const auto add_row = [=](int i, auto begin, auto end) PDARTS_LAMBDA {
    Vec tap[R][K];
    PDARTS_UNROLL
    for (int r = begin.value; r < end.value; ++r) {
      PDARTS_UNROLL
      for (int kw = 0; kw < K; ++kw) tap[r][kw] = in_register(load(w + ((i - r) * K + kw) * V));
    }
    const float* row = p + i * D * row_stride;
    PDARTS_UNROLL
    for (int j = 0; j < (N - 1) * S + (K - 1) * D + 1; ++j) {
      const Vec x = in_register(load(row + j * V));
      PDARTS_UNROLL
      for (int r = begin.value; r < end.value; ++r) {
        PDARTS_UNROLL
        for (int kw = 0; kw < K; ++kw) {
          const int o = j - kw * D;
          if (o >= 0 && o % S == 0 && o / S < N) acc[r][o / S] += tap[r][kw] * x;
        }
      }
    }
  };
  if constexpr (R == 2) add_row(0, Int<0>{}, Int<1>{});
  for (int i = R - 1; i < K; ++i) add_row(i, Int<0>{}, Int<R>{});
  if constexpr (R == 2) add_row(K, Int<1>{}, Int<R>{});
}

// N columns of R rows that are D rows apart, of which the first `count` columns are wanted; `p` as above.
template <int K, int D, int S, int R, int N, class O>
PDARTS_INLINE void depthwise_columns(const float* p, int64_t row_stride, const float* taps, int64_t count,
                                     typename O::Number* to, const O& out) {
  const int64_t pixel_step = out.pixel_step, row_step = D * out.row_step;
  Vec acc[R][N];
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    PDARTS_UNROLL
    for (int i = 0; i < N; ++i) acc[r][i] = Vec{};
  }
  if (out.adds) {
    PDARTS_UNROLL
    for (int r = 0; r < R; ++r) {
      PDARTS_UNROLL
      for (int i = 0; i < N; ++i) acc[r][i] = load(to + r * row_step + i * pixel_step);
    }
  }
  depthwise_block<K, D, S, R, N>(p, row_stride, taps, acc);
  PDARTS_UNROLL
  for (int r = 0; r < R; ++r) {
    auto* at = to + r * row_step;
    if (count >= N) {
      PDARTS_UNROLL
      for (int i = 0; i < N; i += 2, at = unrelated(at + 2 * pixel_step))
        store_both(at, pixel_step, acc[r][i], acc[r][i + 1]);
    } else {
      // Unrolled, or all sums would have to be in memory.
      PDARTS_UNROLL
      for (int i = 0; i < N; ++i, at = unrelated(at + pixel_step))
        if (i < count) store(at, acc[r][i]);
    }
  }
}

// Columns [first, last) of rows [begin, end), R rows by N columns at a time; two rows for a multiple of 2 * D rows.
// Row `row` of the convolution, which is `width` pixels wide, is row 0 of `out` and of `ahead`.
template <int K, int D, int S, int R, int N, class O>
PDARTS_SHARED void depthwise_strip(const Plane& src, int64_t padding, const float* w, int64_t blocks, int64_t row,
                                   int64_t begin, int64_t end, int64_t first, int64_t last, int64_t width,
                                   const Aheads& ahead, const O& out) {
  constexpr int kFirst = R == 1 ? 1 : D;  // rows that follow one another, each the first one of R
  for (int64_t block = 0; block < blocks; ++block, w += K * K * V)
    for (int64_t group = begin; group < end; group += R * kFirst)
      for (int64_t i = group; i < group + kFirst; ++i) {
        const float* from = src.at(block, (row + i) * S - padding, first * S - padding);
        auto* to = out.first + block * out.block_step + i * out.row_step + first * out.pixel_step;
        for (int64_t column = first; column < last; column += N, from += N * S * V, to += N * out.pixel_step) {
          if (ahead.count)
            for (int r = 0; r < R; ++r) ask_share(ahead, (i + r * D) * width + column, N, block);
          depthwise_columns<K, D, S, R, N>(from, src.stride, w, last - column, to, out);
        }
      }
}

// Rows [begin, end) of the convolution, the first of which is row 0 of `out`. Asks `ahead` for as many pixels.
template <int K, int D, int S, class O>
PDARTS_INLINE void depthwise_rows(const Plane& src, int64_t padding, const float* w, int64_t blocks, int64_t begin,
                                  int64_t end, int64_t width, const Aheads& ahead, const O& out) {
  const int64_t rows = end - begin;
  const auto strip = [&](auto together, auto size, int64_t row, int64_t count, int64_t first, int64_t last)
                         PDARTS_LAMBDA {
    if (count > 0 && first < last)
      depthwise_strip<K, D, S, together.value, size.value>(src, padding, w, blocks, begin, row, row + count, first,
                                                           last, width, ahead, out);
  };
  if constexpr (kManyRegisters) {
    // Blocks of 16 columns, then at most 8 columns, of two rows if they share what they read.
    const int64_t wide = min_of(width, (width + kColumns - 1) / kWideColumns * kWideColumns);
    const int64_t paired = S == 1 ? rows / (2 * D) * (2 * D) : 0;
    strip(Int<1>{}, Int<kWideColumns>{}, 0, rows, 0, wide);
    if constexpr (S == 1) strip(Int<2>{}, Int<kColumns>{}, 0, paired, wide, width);
    strip(Int<1>{}, Int<kColumns>{}, paired, rows - paired, wide, width);
  } else {
    strip(Int<1>{}, Int<kColumns>{}, 0, rows, 0, width);
  }
}

// Of a transposed convolution of stride 2, an output row or column meets every other tap from kFirst
// on; with dilation 2 an even one meets all taps and an odd one none.
template <int K, int D, int kFirst>
struct Met {
  static constexpr int kStep = D == 1 ? 2 : 1;
  static constexpr int kCount = D == 1 ? (K - kFirst + 1) / 2 : K;
};

// N outputs in every other column of a row; `g` is the gradient that the first one meets first.
template <int K, int D, int kRow, int kColumn, int N>
PDARTS_INLINE void transposed_block(const float* g, int64_t row_stride, const float* w, Vec* acc) {
  using Rows = Met<K, D, kRow>;
  using Columns = Met<K, D, kColumn>;
  PDARTS_UNROLL
  for (int i = 0; i < N; ++i) acc[i] = Vec{};
  for (int j = 0; j < Rows::kCount; ++j) {
    const float* taps = w + ((kRow + j * Rows::kStep) * K + kColumn) * V;
    Vec tap[Columns::kCount];
    PDARTS_UNROLL
    for (int k = 0; k < Columns::kCount; ++k)
      tap[k] = in_register(load(taps + k * Columns::kStep * V));
    const float* row = g - j * row_stride;
    PDARTS_UNROLL
    for (int i = 1 - Columns::kCount; i < N; ++i) {
      const Vec x = in_register(load(row + i * V));
      PDARTS_UNROLL
      for (int k = 0; k < Columns::kCount; ++k)
        if (i + k >= 0 && i + k < N) acc[i + k] += tap[k] * x;
    }
  }
}

// dst += transposed convolution of `grad` with stride 2, in rows and columns that meet tap kRow and
// kColumn first.
template <int K, int D, int kRow, int kColumn>
PDARTS_INLINE void add_transposed_2(const Plane& grad, const float* w, int64_t padding,
                                    int64_t blocks, const Plane& dst) {
  const auto add = [&](auto n, int64_t block, int64_t row, int64_t column) {
    Vec acc[n.value];
    transposed_block<K, D, kRow, kColumn, n.value>(
        grad.at(block, (row + padding - kRow) / 2, (column + padding - kColumn) / 2), grad.stride,
        w + block * K * K * V, acc);
    const int64_t count = min_of(n.value, (dst.width - column + 1) / 2);
    float* d = dst.at(block, row, column);
    PDARTS_UNROLL
    for (int i = 0; i < n.value; ++i)
      if (i < count) store(d + 2 * i * V, load(d + 2 * i * V) + acc[i]);
  };
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t row = (kRow + padding) % 2; row < dst.height; row += 2) {
      int64_t column = (kColumn + padding) % 2;
      if constexpr (kWideColumns > kColumns)
        for (; dst.width - column > 2 * kColumns; column += 2 * kWideColumns)
          add(Int<kWideColumns>{}, block, row, column);
      for (; column < dst.width; column += 2 * kColumns) add(Int<kColumns>{}, block, row, column);
    }
}

// dst += transposed convolution of `grad` with stride 2; taps that meet no gradient meet its zero
// padding.
template <int K, int D>
PDARTS_INLINE void depthwise_transposed_2(const Plane& grad, const float* w, int64_t padding,
                                          int64_t blocks, const Plane& dst) {
  add_transposed_2<K, D, 0, 0>(grad, w, padding, blocks, dst);
  if constexpr (D == 1) {
    add_transposed_2<K, D, 0, 1>(grad, w, padding, blocks, dst);
    add_transposed_2<K, D, 1, 0>(grad, w, padding, blocks, dst);
    add_transposed_2<K, D, 1, 1>(grad, w, padding, blocks, dst);
  }
}

// acc[kh][kw] += sum over kPixels neighbours in a row of grad * shifted src. One load of src feeds
// up to K sums: with a load for every multiply-add the loads would be the limit.
template <int K, int D, int S, int kRows, int kPixels>
PDARTS_INLINE void weight_block(const float* g, const float* x, int64_t stride, Vec acc[][K]) {
  Vec gi[kPixels];
  PDARTS_UNROLL
  for (int i = 0; i < kPixels; ++i) gi[i] = in_register(load(g + i * V));
  PDARTS_UNROLL
  for (int kh = 0; kh < kRows; ++kh) {
    PDARTS_UNROLL
    for (int i = 0; i < (kPixels - 1) * S + (K - 1) * D + 1; ++i) {
      const Vec v = in_register(load(x + kh * D * stride + i * V));
      PDARTS_UNROLL
      for (int kw = 0; kw < K; ++kw) {
        const int o = i - kw * D;
        if (o >= 0 && o % S == 0 && o / S < kPixels) acc[kh][kw] += gi[o / S] * v;
      }
    }
  }
}

// Rows kFirst .. kFirst + kRows - 1 of the kernel, over rows [begin, end) of the output:
// out[K * K][V] = sums.
template <int K, int D, int S, int kFirst, int kRows, int kPixels>
PDARTS_INLINE void weight_taps(const Plane& grad, const Plane& src, int64_t padding, int64_t block,
                               int64_t begin, int64_t end, float* out) {
  Vec acc[kRows][K];
  PDARTS_UNROLL
  for (int kh = 0; kh < kRows; ++kh) {
    PDARTS_UNROLL
    for (int kw = 0; kw < K; ++kw) acc[kh][kw] = Vec{};
  }
  for (int64_t row = begin; row < end; ++row) {
    const float* g = grad.at(block, row, 0);
    const float* x = src.at(block, row * S + kFirst * D - padding, -padding);
    int64_t i = 0;
    for (; i + kPixels <= grad.width; i += kPixels)
      weight_block<K, D, S, kRows, kPixels>(g + i * V, x + i * S * V, src.stride, acc);
    for (; i < grad.width; ++i)
      weight_block<K, D, S, kRows, 1>(g + i * V, x + i * S * V, src.stride, acc);
  }
  PDARTS_UNROLL
  for (int kh = 0; kh < kRows; ++kh) {
    PDARTS_UNROLL
    for (int kw = 0; kw < K; ++kw) store(out + ((kFirst + kh) * K + kw) * V, acc[kh][kw]);
  }
}

// add_depthwise_weights of stencils.h.
template <int K, int D, int S>
PDARTS_INLINE void depthwise_weights(const Plane& grad, const Plane& src, int64_t padding,
                                     int64_t blocks, int64_t rows, float* out, bool begins) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t begin = 0; begin < grad.height; begin += rows) {
      const int64_t end = min_of(grad.height, begin + rows);
      alignas(64) float part[K * K * V];
      // Sums, gradients and one input in 16 registers: 9 + 4 + 1, 10 + 4 + 1 and 5 + 8 + 1. All 25
      // sums at once fit 32 registers but were slower there (154 GFLOP/s against 223, dilated).
      if constexpr (K == 3) {
        weight_taps<K, D, S, 0, 3, 4>(grad, src, padding, block, begin, end, part);
      } else {
        weight_taps<K, D, S, 0, 2, 4>(grad, src, padding, block, begin, end, part);
        weight_taps<K, D, S, 2, 2, 4>(grad, src, padding, block, begin, end, part);
        weight_taps<K, D, S, 4, 1, 8>(grad, src, padding, block, begin, end, part);
      }
      float* total = out + block * K * K * V;
      for (int t = 0; t < K * K; ++t)
        store(total + t * V, (begins && !begin ? Vec{} : load(total + t * V)) + load(part + t * V));
    }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
