// 3x3 pooling with padding 1 of one channels-last image, and its backward.
//
// Windows overlap, so both poolings first combine rows into a line of one channel block, then its
// columns; the maximum's backward keeps the columns of its window in registers as it moves.
#pragma once

#include <limits>

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Room for a line: one channel block of a row with a pixel outside on either side.
PDARTS_INLINE int64_t pool_line_floats(const Task& t) {
  return (t.in_width + 2) * V;
}

// 1 / (pixels of the window around `centre` that lie inside [0, size)).
PDARTS_INLINE float inverse_extent(int64_t centre, int64_t size) {
  return 1.0f / static_cast<float>(1 + (centre > 0) + (centre + 1 < size));
}

// line [1 + in_width + 1][V] = maximum or sum of the rows around `centre`, a channel block of a row;
// `outside` beyond its ends.
template <bool kMax, class T>
PDARTS_INLINE void combine_rows(const Task& t, const T* centre, bool above, bool below,
                                float* line) {
  const int64_t row = t.in_width * t.x_stride;
  const Vec outside = broadcast(kMax ? -std::numeric_limits<float>::infinity() : 0.0f);
  store(line, outside);
  store(line + (t.in_width + 1) * V, outside);
  for (int64_t w = 0; w < t.in_width; ++w) {
    const T* x = centre + w * t.x_stride;
    Vec v = load(x);
    if (above) v = kMax ? maximum(load(x - row), v) : v + load(x - row);
    if (below) v = kMax ? maximum(load(x + row), v) : v + load(x + row);
    store(line + (w + 1) * V, v);
  }
}

template <bool kMax, class T>
PDARTS_INLINE void pool_row(const Task& t, int64_t stride, const T* image, int64_t row, float* line,
                            T* out) {
  const int64_t h = row * stride;
  const float height = inverse_extent(h, t.in_height);
  for (int64_t c = 0; c < t.channels; c += V) {
    combine_rows<kMax>(t, image + h * t.in_width * t.x_stride + c, h > 0, h + 1 < t.in_height, line);
    for (int64_t w = 0; w < t.out_width; ++w) {
      const float* p = line + w * stride * V;
      const Vec left = load(p), middle = load(p + V), right = load(p + 2 * V);
      if constexpr (kMax)
        store(out + w * t.channels + c, maximum(left, maximum(middle, right)));
      else
        store(out + w * t.channels + c,
              (left + middle + right) * (height * inverse_extent(w * stride, t.in_width)));
    }
  }
}

// y [out pixels, C] = rows [begin, end) of a kMaxPool or kAvgPool branch. `line` has room for
// `pool_line_floats`.
template <class T>
PDARTS_INLINE void pool_rows(const Task& t, const Branch& b, const T* image, int64_t begin,
                             int64_t end, float* line, T* y) {
  for (int64_t row = begin; row < end; ++row, y += t.out_width * t.channels) {
    if (b.kind == kMaxPool)
      pool_row<true>(t, b.stride, image, row, line, y);
    else
      pool_row<false>(t, b.stride, image, row, line, y);
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
