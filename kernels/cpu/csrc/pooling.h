// 3x3 pooling with padding 1 of one channels-last image, and its backward.
//
// Windows overlap: as one moves along a row it keeps its columns, each of them combined, in registers.
// The average's backward first combines rows into a line of one channel block, then its columns.
#pragma once

#include <limits>

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Whether a branch is a pool that is computed anew wherever it is read.
PDARTS_INLINE bool is_recomputed(const Branch& b) { return is_pool(b.kind) && !b.y; }

// Room for a line: one channel block of a row with a pixel outside on either side.
PDARTS_INLINE int64_t pool_line_floats(const Task& t) {
  return (t.in_width + 2) * V;
}

// 1 / (pixels of the window around `centre` that lie inside [0, size)).
PDARTS_INLINE float inverse_extent(int64_t centre, int64_t size) {
  return 1.0f / static_cast<float>(1 + (centre > 0) + (centre + 1 < size));
}

// Columns that a window moves over before it looks whether the row ends.
constexpr int kWindows = 4;

// A row of windows reads three rows of an image. One that lies outside is replaced by the middle row, which
// changes no maximum, and has the weight 0 in the sum (infinity times 0 is NaN, which the BatchNorm behind
// the pool makes of infinity anyway).
struct PoolRows {
  int64_t above, below;  // distances from the middle row
  float above_weight, below_weight;

  PDARTS_INLINE_METHOD PoolRows(const Task& t, int64_t centre) {
    const int64_t step = t.in_width * t.x_stride;
    const bool has_above = centre > 0, has_below = centre + 1 < t.in_height;
    above = has_above ? -step : 0;
    below = has_below ? step : 0;
    above_weight = static_cast<float>(has_above);
    below_weight = static_cast<float>(has_below);
  }
};

// The windows of one row of outputs, a channel block: put(column, a number below kWindows, maximum,
// mean). What `put` leaves out is not computed. `centre` is the middle row of the windows.
template <int S, class T, class Put>
PDARTS_INLINE void pool_windows(const Task& t, const T* centre, const PoolRows& rows, float height,
                                Put put) {
  struct Column {
    Vec most, sum;
  };
  const int64_t width = t.in_width;
  const Vec above_weight = broadcast(rows.above_weight), below_weight = broadcast(rows.below_weight);
  const Column outside{broadcast(-std::numeric_limits<float>::infinity()), Vec{}};
  const auto column = [&](int64_t w) PDARTS_LAMBDA {
    const T* x = centre + w * t.x_stride;
    const Vec v = load(x), above = load(x + rows.above), below = load(x + rows.below);
    return Column{maximum(below, maximum(above, v)), v + above * above_weight + below * below_weight};
  };
  const float inner = height * inverse_extent(1, 3);
  Column left = outside, middle = column(0);
  const auto window = [&](int64_t w, int chain, bool inside) PDARTS_LAMBDA {
    if (S == 2 && w > 0) middle = column(w * S);
    const Column right = inside || w * S + 1 < width ? column(w * S + 1) : outside;
    const float factor = inside ? inner : height * inverse_extent(w * S, width);
    put(w, chain, maximum(left.most, maximum(middle.most, right.most)),
        (left.sum + middle.sum + right.sum) * factor);
    left = S == 1 ? middle : right;
    if (S == 1) middle = right;
  };
  window(0, 0, false);
  int64_t w = 1;
  for (; (w + kWindows - 1) * S + 1 < width; w += kWindows) {
    PDARTS_UNROLL
    for (int i = 0; i < kWindows; ++i) window(w + i, i, true);
  }
  for (; w < t.out_width; ++w) window(w, 0, false);
}

// Channels [c, c + V) of rows [begin, end) of pools of stride S: put(pixel from row `begin` on, a number
// below kWindows that alternates, maximum, mean).
template <int S, class T, class Put>
PDARTS_INLINE void pool_rows_of(const Task& t, const T* image, int64_t begin, int64_t end,
                                int64_t c, Put put) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row * S, first = (row - begin) * t.out_width;
    const T* centre = image + h * t.in_width * t.x_stride + c;
    const float height = inverse_extent(h, t.in_height);
    const auto put_row = [&](int64_t w, int chain, Vec most, Vec mean)
                             PDARTS_LAMBDA { put(first + w, chain, most, mean); };
    pool_windows<S>(t, centre, PoolRows(t, h), height, put_row);
  }
}

// The same for any stride.
template <class T, class Put>
PDARTS_INLINE void pool_rows(const Task& t, int64_t stride, const T* image, int64_t begin,
                             int64_t end, int64_t c, Put put) {
  stride == 1 ? pool_rows_of<1>(t, image, begin, end, c, put)
              : pool_rows_of<2>(t, image, begin, end, c, put);
}

// Asks for what a window some rows below pixel p, from row `begin` on, reads first: rows of a state are often
// a page, across which processors do not look ahead by themselves.
template <class T>
PDARTS_INLINE void ask_below(const Task& t, int64_t stride, const T* image, int64_t begin, int64_t p,
                             int64_t c) {
  constexpr int64_t kRows = 3;
  if (stride == 1) ask_for(image + ((begin + kRows) * t.in_width + p) * t.x_stride + c);
}

// y [out pixels, C] = rows [begin, end) of a kMaxPool or kAvgPool branch.
template <class T>
PDARTS_SHARED void store_pool(const Task& t, const Branch& b, const T* image, int64_t begin,
                              int64_t end, T* y) {
  for (int64_t c = 0; c < t.channels; c += V) {
    T* to = y + c;
    if (b.kind == kMaxPool)
      pool_rows(t, b.stride, image, begin, end, c, [&](int64_t p, int, Vec most, Vec)
                                                       PDARTS_LAMBDA {
        store(to + p * t.channels, most);
      });
    else
      pool_rows(t, b.stride, image, begin, end, c, [&](int64_t p, int, Vec, Vec mean)
                                                       PDARTS_LAMBDA {
        store(to + p * t.channels, mean);
      });
  }
}

// line [1 + out_width + 1][V] = a channel block of the N rows of dy from `row` on, each divided by the
// areas of its windows.
template <int N>
PDARTS_INLINE void combine_gradients(const Task& t, int64_t stride, const float* dy, int64_t row,
                                     float* line) {
  const int64_t step = t.out_width * t.channels;
  Vec height[N];
  PDARTS_UNROLL
  for (int i = 0; i < N; ++i) height[i] = broadcast(inverse_extent((row + i) * stride, t.in_height));
  dy += row * step;
  for (int64_t w = 0; w < t.out_width; ++w) {
    Vec sum = load(dy + w * t.channels) * height[0];
    PDARTS_UNROLL
    for (int i = 1; i < N; ++i) sum += load(dy + i * step + w * t.channels) * height[i];
    store(line + (w + 1) * V, sum * inverse_extent(w * stride, t.in_width));
  }
}

// dx [in pixels, C] += gradient of the average pool of stride S for dy [out pixels, C].
template <int S>
PDARTS_INLINE void average_backward(const Task& t, const float* dy, float* line, float* dx) {
  store(line, Vec{});
  store(line + (t.out_width + 1) * V, Vec{});
  for (int64_t h = 0; h < t.in_height; ++h) {
    // Rows of windows that row h is part of.
    const int64_t first = h < 1 ? 0 : (h - 2 + S) / S;
    const int64_t rows = min_of((h + 1) / S, t.out_height - 1) - first + 1;
    for (int64_t c = 0; c < t.channels; c += V) {
      if (rows == 1) combine_gradients<1>(t, S, dy + c, first, line);
      if (rows == 2) combine_gradients<2>(t, S, dy + c, first, line);
      if (rows == 3) combine_gradients<3>(t, S, dy + c, first, line);
      for (int64_t w = 0; w < t.in_width; ++w) {
        float* d = dx + (h * t.in_width + w) * t.channels + c;
        // Of the first window that the pixel is part of.
        const float* p = line + (S == 1 ? w : w / 2 + 1) * V;
        Vec sum = load(d) + load(p);
        if (S == 1) sum += load(p + V) + load(p + 2 * V);
        if (S == 2 && w % 2) sum += load(p + V);
        store(d, sum);
      }
    }
  }
}

// One row of windows, a channel block: the first maximum in row-major order takes all, as in torch.
template <int S, class T>
PDARTS_INLINE void maximum_row_backward(const Task& t, const T* image, const T* y, const float* dy,
                                        int64_t row, int64_t c, float* dx) {
  const int64_t channels = t.channels, width = t.in_width;
  // NaN is no maximum of anything, so pixels outside take no gradient.
  const Vec outside = broadcast(std::numeric_limits<float>::quiet_NaN());
  const auto inside = [&](int i) {
    const int64_t h = row * S + i - 1;
    return h >= 0 && h < t.in_height;
  };
  const auto pixel = [&](int i, int64_t column) { return (row * S + i - 1) * width + column; };
  Vec x[3][3], d[3][3];
  const auto enter = [&](int j, int64_t column) {
    PDARTS_UNROLL
    for (int i = 0; i < 3; ++i) {
      const bool exists = inside(i) && column >= 0 && column < width;
      x[i][j] = exists ? load(image + pixel(i, column) * t.x_stride + c) : outside;
      d[i][j] = Vec{};
    }
  };
  const auto leave = [&](int j, int64_t column) {
    if (column < 0 || column >= width) return;
    PDARTS_UNROLL
    for (int i = 0; i < 3; ++i) {
      if (!inside(i)) continue;
      float* to = dx + pixel(i, column) * channels + c;
      store(to, load(to) + d[i][j]);
    }
  };
  PDARTS_UNROLL
  for (int j = 0; j < 3 - S; ++j) enter(j, j - 1);
  for (int64_t w = 0; w < t.out_width; ++w) {
    PDARTS_UNROLL
    for (int j = 3 - S; j < 3; ++j) enter(j, w * S + j - 1);
    const Vec top = load(y + (row * t.out_width + w) * channels + c);
    Vec rest = load(dy + (row * t.out_width + w) * channels + c);
    PDARTS_UNROLL
    for (int i = 0; i < 3; ++i) {
      PDARTS_UNROLL
      for (int j = 0; j < 3; ++j) {
        const auto hit = x[i][j] == top;
        d[i][j] += hit ? rest : Vec{};
        rest = hit ? Vec{} : rest;
      }
    }
    PDARTS_UNROLL
    for (int j = 0; j < S; ++j) leave(j, w * S + j - 1);
    PDARTS_UNROLL
    for (int j = S; j < 3; ++j) {
      PDARTS_UNROLL
      for (int i = 0; i < 3; ++i) {
        x[i][j - S] = x[i][j];
        d[i][j - S] = d[i][j];
      }
    }
  }
  PDARTS_UNROLL
  for (int j = 0; j < 3 - S; ++j) leave(j, t.out_width * S + j - 1);
}

template <int S, class T>
PDARTS_INLINE void maximum_backward(const Task& t, const T* image, const T* y, const float* dy,
                                    float* dx) {
  for (int64_t row = 0; row < t.out_height; ++row)
    for (int64_t c = 0; c < t.channels; c += V)
      maximum_row_backward<S>(t, image, y, dy, row, c, dx);
}

// dx [in pixels, C] += gradient of the pool y for dy [out pixels, C]. `line` has room for
// `pool_line_floats`.
template <class T>
PDARTS_INLINE void pool_backward(const Task& t, const Branch& b, const T* image, const T* y,
                                 const float* dy, float* line, float* dx) {
  if (b.kind == kAvgPool)
    b.stride == 1 ? average_backward<1>(t, dy, line, dx) : average_backward<2>(t, dy, line, dx);
  else if (b.stride == 1)
    maximum_backward<1>(t, image, y, dy, dx);
  else
    maximum_backward<2>(t, image, y, dy, dx);
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
