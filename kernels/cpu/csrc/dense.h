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
// neither the depthwise output nor its gradient is computed. With 32 channels the stencil is faster. What a
// convolution reads is laid out in paired_rows.h.
#pragma once

#include "paired_rows.h"
#include "tiles.h"

namespace pdarts {
namespace PDARTS_VARIANT {

#ifdef PDARTS_AMX

constexpr int64_t kTile = V * kLine;  // numbers of a tile of bfloat16
constexpr int64_t kMostTaps = 25;

// Tile registers while `WholeTiles` lives. Forward 0 to 3 are sums, for the weights' gradients 0 to K - 1.
enum DenseTile { kPixels = 4, kNextPixels = 5, kFirstRow = 6, kSecondRow = 7, kTurned = 7 };

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
            store(to, in_turns(as_line(term(c), term(c + 1))));
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
        plane.line(pair.rest, plane.number_of(pair.row) / 2, column + (kLead - K / 2) * plane.dilation);
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
            const BFloat* lines = plane.line(rest, pair + place / 2,
                                             tile * kTileSide + (kLead - K / 2) * dilation);
            // With 3 sums dy and v alternate between five registers: a load waits for the products that read
            // what was there (0.83 of the time).
            const auto multiply = [&](auto left) PDARTS_LAMBDA {
              load_tile<left.value>(turned + ((pair - begin) * tiles + tile) * kTile, kLineBytes);
              each_column([&](auto k) PDARTS_LAMBDA {
                constexpr int kRight = K + k.value % (K == 3 ? 3 : 2);
                load_tile<kRight>(lines + k.value * dilation * kLine, kLineBytes);
                multiply_tiles<k.value, left.value, kRight>();
              });
            };
            if (K == 3 && tile % 2) multiply(Int<kTurned - 1>{});
            else multiply(Int<kTurned>{});
            ahead.ask_all(((before + pair) * tiles + tile) * 2 * kTileSide + i * kAsked, kAsked);
          }
        each_column([&](auto k) PDARTS_LAMBDA { store_tile<k.value>(sum + k.value * V * V, kLineBytes); });
      }
    }
    before += pairs;
  }
}

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

#endif  // PDARTS_AMX

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
