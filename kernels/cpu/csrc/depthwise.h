// Depthwise convolution of one image in registers: forward, transposed, and of the weights.
//
// Weights are packed [C / V][K * K][V]. Along a row, one load of the input feeds up to K outputs,
// so the loops are bound by multiply-adds and not by loads.
#pragma once

#include "lines.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Output columns computed together: 8 accumulators, 5 weights and 1 input fit 16 registers. A
// multiply-add takes four cycles and two begin in each: 8 sums just keep both units busy, 16 do.
constexpr int kColumns = 8;
constexpr int kWideColumns = kManyRegisters ? 16 : kColumns;

// Calls f(Int<K>, Int<dilation>, Int<stride>).
template <class F>
PDARTS_INLINE void with_kernel(const Branch& b, F f) {
  if (b.kernel == 3) {
    if (b.dilation == 1) {
      if (b.stride == 1) f(Int<3>{}, Int<1>{}, Int<1>{});
      else f(Int<3>{}, Int<1>{}, Int<2>{});
    } else {
      if (b.stride == 1) f(Int<3>{}, Int<2>{}, Int<1>{});
      else f(Int<3>{}, Int<2>{}, Int<2>{});
    }
  } else {
    if (b.dilation == 1) {
      if (b.stride == 1) f(Int<5>{}, Int<1>{}, Int<1>{});
      else f(Int<5>{}, Int<1>{}, Int<2>{});
    } else {
      if (b.stride == 1) f(Int<5>{}, Int<2>{}, Int<1>{});
      else f(Int<5>{}, Int<2>{}, Int<2>{});
    }
  }
}

// [C, K, K] -> [C / V][K * K][V]; `flip` turns the kernel by 180 degrees.
PDARTS_INLINE void pack_depthwise(const float* w, int64_t channels, int64_t taps, bool flip,
                                  float* packed) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t)
      packed[(c / V * taps + t) * V + c % V] = w[c * taps + (flip ? taps - 1 - t : t)];
}

// N outputs of one row; `p` points at the first tap of the first output.
template <int K, int D, int S, int N>
PDARTS_INLINE void depthwise_block(const float* p, int64_t row_stride, const float* w, Vec* acc) {
  PDARTS_UNROLL
  for (int i = 0; i < N; ++i) acc[i] = Vec{};
  for (int kh = 0; kh < K; ++kh) {
    Vec tap[K];
    PDARTS_UNROLL
    for (int kw = 0; kw < K; ++kw) tap[kw] = in_register(load(w + (kh * K + kw) * V));
    const float* row = p + kh * D * row_stride;
    PDARTS_UNROLL
    for (int i = 0; i < (N - 1) * S + (K - 1) * D + 1; ++i) {
      const Vec x = in_register(load(row + i * V));
      PDARTS_UNROLL
      for (int kw = 0; kw < K; ++kw) {
        const int o = i - kw * D;
        if (o >= 0 && o % S == 0 && o / S < N) acc[o / S] += tap[kw] * x;
      }
    }
  }
}

// N columns of a row, of which the first `count` are wanted: put(row, column, block, values, Int<how many>)
// of two neighbours, or of one.
template <int K, int D, int S, int N, class Put>
PDARTS_INLINE void depthwise_columns(const Plane& src, int64_t padding, const float* taps,
                                     int64_t block, int64_t row, int64_t column, int64_t count,
                                     Put put) {
  Vec acc[N];
  const float* p = src.at(block, row * S - padding, column * S - padding);
  depthwise_block<K, D, S, N>(p, src.stride, taps, acc);
  if (count >= N) {
    PDARTS_UNROLL
    for (int i = 0; i < N; i += 2) put(row, column + i, block, acc + i, Int<2>{});
  } else {
    for (int64_t i = 0; i < count; ++i) put(row, column + i, block, acc + i, Int<1>{});
  }
}

// Rows [begin, end) of the convolution: `put` as above, once an output. Asks `ahead` for as many pixels.
template <int K, int D, int S, class A, class Put>
PDARTS_INLINE void depthwise_rows(const Plane& src, int64_t padding, const float* w,
                                  int64_t blocks, int64_t begin, int64_t end, int64_t width,
                                  const A& ahead, Put put) {
  for (int64_t block = 0; block < blocks; ++block) {
    const float* taps = w + block * K * K * V;
    for (int64_t row = begin; row < end; ++row) {
      int64_t column = 0;
      if constexpr (kWideColumns > kColumns)
        for (; width - column > kColumns; column += kWideColumns) {
          ahead.ask_share((row - begin) * width + column, kWideColumns, block);
          depthwise_columns<K, D, S, kWideColumns>(src, padding, taps, block, row, column,
                                                   width - column, put);
        }
      for (; column < width; column += kColumns) {
        ahead.ask_share((row - begin) * width + column, kColumns, block);
        depthwise_columns<K, D, S, kColumns>(src, padding, taps, block, row, column,
                                             width - column, put);
      }
    }
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
    for (int64_t i = 0; i < count; ++i) store(d + 2 * i * V, load(d + 2 * i * V) + acc[i]);
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

// out [C / V][K * K][V] = or, unless it begins, += sum over pixels of grad * shifted src. Sums run over at
// most `rows` rows before they join the total: short chains keep float accurate.
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

// a [(end - begin) * width, channels] = rows [begin, end) of a branch's depthwise convolution. Asks `ahead`
// for as many pixels.
template <class E, class A>
PDARTS_SHARED void depthwise_chunk(const Branch& b, const Plane& src, const float* w,
                                   int64_t channels, int64_t begin, int64_t end, int64_t width,
                                   const A& ahead, E* a) {
  with_kernel(b, [&](auto k, auto d, auto s) {
    depthwise_rows<k.value, d.value, s.value>(
        src, b.padding, w, channels / V, begin, end, width, ahead,
        [=](int64_t row, int64_t column, int64_t block, const Vec* v, auto count) PDARTS_LAMBDA {
          E* to = a + ((row - begin) * width + column) * channels + block * V;
          if constexpr (count.value == 2) store_both(to, channels, v[0], v[1]);
          else store(to, v[0]);
        });
  });
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
