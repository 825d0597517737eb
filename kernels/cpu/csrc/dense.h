// Depthwise-separable convolutions of 16 channels as dense ones, on the matrix unit of AMX.
//
//   y[o] = sum over taps and channels of W[o][c] d[c][tap] v[c] shifted by the tap
//
// The products W d are made once a task. That is 16 times the multiply-adds of the stencil, on a unit that
// does 16 times as many; but nothing is unpacked to float32, there is no depthwise output to round and to
// store, and no product after it. Backward, with
//
//   M[tap][o][c] = sum over pixels of dy[o] v[c] shifted by the tap
//
// both weight gradients follow, dW[o][c] = sum over taps of d M and dd[c][tap] = sum over o of W M, so that
// neither the depthwise output nor its gradient is computed. With 32 channels the stencil is faster.
//
// A tile multiplies 16 pixels by 32 terms of a sum: the channels of two rows that a kernel's taps meet one
// after the other, those of a line. Two rows of outputs read the same lines with different weights:
//
//   plane row   i  i+1 | i+2 i+3 | i+4 i+5      kernel of 5, output rows i and i + 1 of a class
//   first       d0  d1 |  d2  d3 |  d4   0
//   second       0  d0 |  d1  d2 |  d3  d4
//
// With 3 taps a row the lines begin one row later. Rows of a dilated kernel skip some: a class is the rows
// whose numbers leave the same remainder.
#pragma once

#include "depthwise.h"
#include "lines.h"
#include "tiles.h"

namespace pdarts {
namespace PDARTS_VARIANT {

constexpr int64_t kLead = 2;  // rows of zeros in front of a class, columns likewise

#ifdef PDARTS_AMX

constexpr int64_t kLine = 2 * V;      // numbers of a line: two rows of a pixel
constexpr int64_t kTile = V * kLine;  // numbers of a tile of bfloat16
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMostTaps = 25;

// Tile registers while `WholeTiles` lives. Forward 0 to 3 are sums, for the weights' gradients 0 to 4.
enum DenseTile {
  kPixels = 4,
  kNextPixels = 5,
  kFirstRow = 6,
  kSecondRow = 7,
  kEvenColumn = 5,
  kOddColumn = 6,
  kTurned = 7
};

// Pixels of a row in whole tiles.
PDARTS_INLINE int64_t tiled_width(int64_t width) {
  return (width + kTileSide - 1) / kTileSide * kTileSide;
}

// Whether a task's depthwise convolutions are computed as dense ones: rows fill most of their tiles.
template <class T>
PDARTS_INLINE bool is_dense(const Task& t) {
  if (sizeof(T) != sizeof(BFloat) || t.channels != V) return false;
  if (4 * t.out_width < 3 * tiled_width(t.out_width)) return false;
  bool any = false;
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    if (b.kind != kConv) continue;
    if (b.stride != 1) return false;
    any = true;
  }
  return any;
}

// A zero-padded image as lines: [class][pair of rows][column][2][16].
struct PairedRows {
  BFloat* data;
  int64_t height, width, dilation;
  bool late;  // a line begins with an odd row

  // Pairs of rows of a class; the first one has most.
  int64_t pairs(int64_t rest) const {
    const int64_t rows = (height - rest + dilation - 1) / dilation;
    return (rows + 1) / 2;
  }

  int64_t lines() const { return pairs(0) + kLead; }
  int64_t columns() const { return tiled_width(width) + 2 * kLead * dilation; }
  int64_t size() const { return dilation * lines() * columns() * kLine; }

  static PairedRows make(Scratch& scratch, int64_t height, int64_t width, int64_t dilation, bool late) {
    PairedRows p{nullptr, height, width, dilation, late};
    p.data = scratch.take<BFloat>(p.size());
    std::memset(p.data, 0, static_cast<size_t>(p.size()) * sizeof(BFloat));
    return p;
  }

  BFloat* line(int64_t rest, int64_t pair, int64_t column) const {
    return data + ((rest * lines() + pair) * columns() + column) * kLine;
  }

  // Where the first pixel of a row is; pixels are a line apart.
  BFloat* row(int64_t number) const {
    const int64_t place = number / dilation + kLead - late;
    return line(number % dilation, place / 2, kLead * dilation) + place % 2 * V;
  }
};

// Two rows of a class, `dilation` apart; a last one may be alone.
struct RowPair {
  int64_t rest, row, count;
  int64_t number;  // of pairs before this one
};

// Pair `index` of a class.
PDARTS_INLINE RowPair pair_of(const PairedRows& plane, int64_t rest, int64_t index, int64_t number) {
  const int64_t row = rest + 2 * plane.dilation * index;
  return {rest, row, row + plane.dilation < plane.height ? 2 : 1, number};
}

// f(pair) for all rows of an image.
template <class F>
PDARTS_INLINE void each_pair(const PairedRows& plane, F f) {
  int64_t number = 0;
  for (int64_t rest = 0; rest < plane.dilation; ++rest)
    for (int64_t i = 0; i < plane.pairs(rest); ++i) f(pair_of(plane, rest, i, number++));
}

// plane = f(pixel) for every pixel of the image, in all planes that are not null.
template <class F>
PDARTS_INLINE void fill_rows(int64_t height, int64_t width, const PairedRows* early, const PairedRows* late,
                             F f) {
  for (int64_t row = 0; row < height; ++row) {
    BFloat* first = early ? early->row(row) : nullptr;
    BFloat* second = late ? late->row(row) : nullptr;
    for (int64_t column = 0; column < width; ++column) {
      const Vec v = f(row * width + column);
      if (first) store(first + column * kLine, v);
      if (second) store(second + column * kLine, v);
    }
  }
}

// Both planes = f(pixel) for every pixel of the image, with the channels of a line's rows in turns.
template <class F>
PDARTS_INLINE void fill_in_turns(const PairedRows& early, const PairedRows& late, F f) {
  const int64_t width = early.width, step = early.dilation;
  const auto fill_line = [&](BFloat* to, int64_t row, auto first, auto second) PDARTS_LAMBDA {
    for (int64_t column = 0; column < width; ++column) {
      const int64_t p = row * width + column;
      const __m512i line = as_line(first.value ? f(p) : Vec{}, second.value ? f(p + step * width) : Vec{});
      _mm512_storeu_si512(to + column * kLine, in_turns(line));
    }
  };
  // Lines of rows `row` and `row + step`.
  for (int64_t row = -step; row < early.height; ++row) {
    if (row < 0 && row + step >= early.height) continue;
    const bool is_late = (row + step) / step % 2 == 0;
    BFloat* to = is_late ? late.row(row + step) - V : early.row(row);
    if (row < 0) fill_line(to, row, Int<0>{}, Int<1>{});
    else if (row + step < early.height) fill_line(to, row, Int<1>{}, Int<1>{});
    else fill_line(to, row, Int<1>{}, Int<0>{});
  }
}

// Tiles of a convolution's W d: [pairs of rows][column of the kernel][row of outputs][tile].
PDARTS_INLINE int64_t dense_numbers(const Task& t, const Branch& b) {
  if (b.kind != kConv || t.channels != V) return 0;
  return (b.kernel + 1) / 2 * b.kernel * 2 * kTile;
}

// Packs W d of a convolution; `transposed` for the gradient of its input, with the kernel turned by 180
// degrees. `depthwise` is packed as depthwise.h does, turned likewise.
PDARTS_SHARED void pack_dense(const Branch& b, const float* depthwise, bool transposed, BFloat* to) {
  alignas(64) float matrix[V][V];  // [term][output]
  for (int64_t i = 0; i < V; ++i)
    for (int64_t j = 0; j < V; ++j) matrix[transposed ? i : j][transposed ? j : i] = b.pointwise[i * V + j];
  const int64_t kernel = b.kernel;
  for (int64_t pair = 0; pair < (kernel + 1) / 2; ++pair)
    for (int64_t column = 0; column < kernel; ++column)
      for (int64_t output = 0; output < 2; ++output)
        for (int64_t row = 0; row < 2; ++row) {
          const int64_t tap = 2 * pair + row - output;
          const bool inside = tap >= 0 && tap < kernel;
          const float* d = depthwise + (inside ? tap * kernel + column : 0) * V;
          // dW of the gradient has its factor d in the output's channel.
          const auto term = [&](int64_t c) {
            if (!inside) return Vec{};
            return load(matrix[c]) * (transposed ? load(d) : broadcast(d[c]));
          };
          for (int64_t c = 0; c < V; c += 2, to += kLine)
            _mm512_storeu_si512(to, in_turns(as_line(term(c), term(c + 1))));
        }
}

// first and second [tiled_width][16] = or += a pair of rows of a convolution. Asks `ahead` for as many pixels
// between the products: no more than some lines can be on their way. Needs `WholeTiles`.
template <int K>
PDARTS_SHARED void dense_rows(const PairedRows& plane, const BFloat* weights, const RowPair& pair,
                              float* first, float* second, bool add, const Aheads& ahead) {
  const int64_t width = tiled_width(plane.width), next_line = plane.columns() * kLine;
  const int64_t step = plane.dilation * kLine;
  constexpr int64_t kLines = (K + 1) / 2, kAsked = (4 * kTileSide / (kLines * K) + 2) / 2 * 2;
  for (int64_t column = 0; column < width; column += 2 * kTileSide) {
    const bool two = column + kTileSide < width;
    float *left = first + column * V, *right = left + kTileSide * V;
    float *left_second = second + column * V, *right_second = left_second + kTileSide * V;
    if (add) {
      load_tile<0>(left, kLineBytes);
      load_tile<2>(left_second, kLineBytes);
      if (two) load_tile<1>(right, kLineBytes);
      if (two) load_tile<3>(right_second, kLineBytes);
    } else {
      clear_tile<0>();
      clear_tile<1>();
      clear_tile<2>();
      clear_tile<3>();
    }
    const BFloat* w = weights;
    const BFloat* lines =
        plane.line(pair.rest, pair.row / plane.dilation / 2, column + (kLead - K / 2) * plane.dilation);
    int64_t asked = pair.number * 2 * plane.width + 2 * column;
    for (int i = 0; i < kLines; ++i, lines += next_line) {
      PDARTS_UNROLL
      for (int k = 0; k < K; ++k, w += 2 * kTile, asked += kAsked) {
        const BFloat* pixels = lines + k * step;
        load_tile<kFirstRow>(w, kLineBytes);
        load_tile<kPixels>(pixels, kLineBytes);
        multiply_tiles<0, kPixels, kFirstRow>();
        load_tile<kSecondRow>(w + kTile, kLineBytes);
        if (two) load_tile<kNextPixels>(pixels + kTile, kLineBytes);
        if (two) multiply_tiles<1, kNextPixels, kFirstRow>();
        multiply_tiles<2, kPixels, kSecondRow>();
        if (two) multiply_tiles<3, kNextPixels, kSecondRow>();
        ahead.ask_all(asked, kAsked);
      }
    }
    store_tile<0>(left, kLineBytes);
    store_tile<2>(left_second, kLineBytes);
    if (two) store_tile<1>(right, kLineBytes);
    if (two) store_tile<3>(right_second, kLineBytes);
  }
}

PDARTS_INLINE void dense_rows(const Branch& b, const PairedRows& plane, const BFloat* weights,
                              const RowPair& pair, float* first, float* second, bool add,
                              const Aheads& ahead) {
  b.kernel == 3 ? dense_rows<3>(plane, weights, pair, first, second, add, ahead)
                : dense_rows<5>(plane, weights, pair, first, second, add, ahead);
}

// Pairs of rows that stay in the first-level cache for all taps.
constexpr int64_t kStrip = 8;

// sums [taps][16][16] = M of an image: `planes` are v in turns, early and late; turn(class, first pair, behind
// the last one) puts dy of a strip into `turned`, where it is still near when it is read. Asks `ahead` for as
// many pixels.
template <int K, class Turn>
PDARTS_INLINE void dense_weights(const BFloat* turned, const PairedRows* planes, const Ahead& ahead,
                                 float* sums, Turn turn) {
  const int64_t dilation = planes->dilation;
  const int64_t width = tiled_width(planes->width), tiles = width / kTileSide;
  constexpr int64_t kAsked = (2 * kTileSide / K + 2) / 2 * 2;
  int64_t before = 0;  // pairs of earlier classes
  const auto each_column = [&](auto f) PDARTS_LAMBDA {
    f(std::integral_constant<int, 0>());
    f(std::integral_constant<int, 1>());
    f(std::integral_constant<int, 2>());
    if constexpr (K == 5) f(std::integral_constant<int, 3>());
    if constexpr (K == 5) f(std::integral_constant<int, 4>());
  };
  for (int64_t rest = 0; rest < dilation; ++rest) {
    const int64_t pairs = planes->pairs(rest);
    for (int64_t begin = 0; begin < pairs; begin += kStrip) {
      turn(rest, begin, min_of(begin + kStrip, pairs));
      // Rows of the kernel that read one plane, then those that read the other.
      for (int64_t i = 0; i < K; ++i) {
        const int64_t tap = i <= K / 2 ? 2 * i : 2 * (i - K / 2) - 1;
        float* sum = sums + tap * K * V * V;
        each_column([&](auto k) PDARTS_LAMBDA {
          if (rest + begin == 0) clear_tile<k.value>();
          else load_tile<k.value>(sum + k.value * V * V, kLineBytes);
        });
        const int64_t place = tap + kLead - K / 2;
        const PairedRows& plane = planes[place % 2];
        for (int64_t pair = begin; pair < min_of(begin + kStrip, pairs); ++pair)
          for (int64_t tile = 0; tile < tiles; ++tile) {
            load_tile<kTurned>(turned + ((pair - begin) * tiles + tile) * kTile, kLineBytes);
            const BFloat* lines = plane.line(rest, pair + place / 2,
                                             tile * kTileSide + (kLead - K / 2) * dilation);
            each_column([&](auto k) PDARTS_LAMBDA {
              constexpr int kRight = k.value % 2 ? kOddColumn : kEvenColumn;
              load_tile<kRight>(lines + k.value * dilation * kLine, kLineBytes);
              multiply_tiles<k.value, kTurned, kRight>();
            });
            ahead.ask_all(((before + pair) * tiles + tile) * 2 * kTileSide + i * kAsked, kAsked);
          }
        each_column([&](auto k) PDARTS_LAMBDA { store_tile<k.value>(sum + k.value * V * V, kLineBytes); });
      }
    }
    before += pairs;
  }
}

// A thread's planes of an image, for the convolutions of a task.
struct DensePlanes {
  PairedRows all[2][2];  // [dilation - 1][late]

  // Those that a convolution reads.
  const PairedRows& of(const Branch& b) const { return all[b.dilation - 1][b.kernel == 3]; }

  // Calls f(early, late) for each dilation; null where there is no plane.
  template <class F>
  void each(F f) const {
    for (const PairedRows* planes : all) {
      const PairedRows* early = planes[0].data ? &planes[0] : nullptr;
      const PairedRows* late = planes[1].data ? &planes[1] : nullptr;
      if (early || late) f(early, late);
    }
  }

  // Room for what `make` takes.
  static int64_t bytes(const Task& t) {
    int64_t bytes = 0;
    for (int64_t dilation = 1; dilation <= 2; ++dilation) {
      const PairedRows plane{nullptr, t.out_height, t.out_width, dilation, false};
      bytes += 2 * Scratch::bytes_for<BFloat>(plane.size());
    }
    return bytes;
  }

  // Makes those that the task's convolutions read; `both` of each dilation for the weights' gradients.
  static DensePlanes make(const Task& t, Scratch& scratch, bool both) {
    bool read[2][2] = {};
    for (int64_t i = 0; i < t.num_branches; ++i) {
      const Branch& b = t.branches[i];
      if (b.kind != kConv) continue;
      bool* late = read[b.dilation - 1];
      late[0] |= both || b.kernel == 5;
      late[1] |= both || b.kernel == 3;
    }
    DensePlanes planes{};
    for (int i = 0; i < 2; ++i)
      for (int late = 0; late < 2; ++late)
        if (read[i][late])
          planes.all[i][late] = PairedRows::make(scratch, t.out_height, t.out_width, i + 1, late == 1);
    return planes;
  }
};

// Numbers of two rows of outputs in whole tiles.
PDARTS_INLINE int64_t pair_numbers(const Task& t) { return 2 * tiled_width(t.out_width) * V; }

// Adds what follows from M to the weight gradients, packed [taps][16] and [16][16], or begins them.
// `depthwise` is packed.
PDARTS_SHARED void add_weight_gradients(const Branch& b, const float* depthwise, const float* m,
                                        float* grad_depthwise, float* grad_pointwise, bool begins) {
  Vec of_pointwise[V] = {};
  for (int64_t tap = 0; tap < b.kernel * b.kernel; ++tap) {
    const Vec d = load(depthwise + tap * V);
    Vec of_tap{};
    PDARTS_UNROLL
    for (int i = 0; i < V; ++i, m += V) {
      of_pointwise[i] += d * load(m);
      of_tap += load(b.pointwise + i * V) * load(m);
    }
    float* out = grad_depthwise + tap * V;
    store(out, begins ? of_tap : load(out) + of_tap);
  }
  for (int i = 0; i < V; ++i) {
    float* out = grad_pointwise + i * V;
    store(out, begins ? of_pointwise[i] : load(out) + of_pointwise[i]);
  }
}

#else

template <class T>
constexpr bool is_dense(const Task&) {
  return false;
}

constexpr int64_t dense_numbers(const Task&, const Branch&) { return 0; }

constexpr int64_t tiled_width(int64_t width) { return width; }

#endif  // PDARTS_AMX

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
