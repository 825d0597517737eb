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
  const int64_t width = t.in_width, windows = t.out_width, stride = t.x_stride;
  const Vec above_weight = broadcast(rows.above_weight), below_weight = broadcast(rows.below_weight);
  const Column outside{broadcast(-std::numeric_limits<float>::infinity()), Vec{}};
  const auto column = [&](int64_t w) PDARTS_LAMBDA {
    const T* x = centre + w * stride;
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
  for (; w < windows; ++w) window(w, 0, false);
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
template <class T, class Y>
PDARTS_SHARED void store_pool(const Task& t, const Branch& b, const T* image, int64_t begin,
                              int64_t end, Y* y) {
  const int64_t channels = t.channels;
  for (int64_t c = 0; c < channels; c += V) {
    Y* to = y + c;
    if (b.kind == kMaxPool)
      pool_rows(t, b.stride, image, begin, end, c, [=](int64_t p, int, Vec most, Vec) PDARTS_LAMBDA {
        store(to + p * channels, most);
      });
    else
      pool_rows(t, b.stride, image, begin, end, c, [=](int64_t p, int, Vec, Vec mean) PDARTS_LAMBDA {
        store(to + p * channels, mean);
      });
  }
}

// Backward, row by row: the gradient of a row of x needs few rows of windows, whose lines [C / V][out_width][V]
// stay in the first-level cache.

// dy of the pools of one kind that read one state: they share their y, so theirs is one sum.
template <class T>
struct PoolGradient {
  const Task& t;
  int64_t kind, first_pixel;  // of the batch
  const Branch* any;          // one of them, null if there is none
  float *constant, *of_y;     // [C]

  // `room` has 2 C floats.
  PoolGradient(const Task& t, int64_t kind, int64_t n, float* room)
      : t(t), kind(kind), first_pixel(n * t.out_height * t.out_width), any(nullptr), constant(room),
        of_y(room + t.channels) {
    for (int64_t i = 0; i < t.num_branches; ++i) {
      const Branch& b = t.branches[i];
      if (b.kind != kind) continue;
      for (int64_t c = 0; c < t.channels; ++c) {
        of_y[c] = (any ? of_y[c] : 0.0f) + b.coef[t.channels + c];
        constant[c] = (any ? constant[c] : 0.0f) + b.coef[2 * t.channels + c];
      }
      any = &b;
    }
  }

  // line = what does not depend on y, of a row of windows.
  PDARTS_INLINE_METHOD void fill(int64_t row, float* line) const {
    bool begins = true;
    for (int64_t i = 0; i < t.num_branches; ++i) {
      const Branch& b = t.branches[i];
      if (b.kind != kind) continue;
      const T* g = static_cast<const T*>(b.grad) + (first_pixel + row * t.out_width) * b.grad_stride;
      const int64_t width = t.out_width, stride = b.grad_stride;
      for (int64_t c = 0; c < t.channels; c += V) {
        const Vec factor = load(b.coef + c), offset = load(constant + c);
        float* to = line + c * width;
        for (int64_t w = 0; w < width; ++w, to += V)
          store(to, (begins ? offset : load(to)) + factor * load(g + w * stride + c));
      }
      begins = false;
    }
  }
};

// The last row of windows that row h of x is part of.
PDARTS_INLINE int64_t last_window(const Task& t, int64_t stride, int64_t h) {
  const int64_t last = (h + 1) / stride;
  return last < t.out_height ? last : t.out_height - 1;
}

// What the gradients of both kinds have in common. `Pool` has add<stride>, as `add_row`.
template <class T, class Pool>
class PoolBackward {
 public:
  // `room` has `pool_floats`.
  PoolBackward(const Task& t, int64_t kind, const T* image, int64_t n, float* room)
      : t_(t), image_(image), dy_(t, kind, n, room), fresh_(room + 2 * t.channels) {}

  // dx [in_width, C] += gradient of row h, which is the one behind that of the last call.
  void add_row(int64_t h, float* dx) {
    if (!dy_.any) return;
    Pool& pool = static_cast<Pool&>(*this);
    dy_.any->stride == 1 ? pool.template add<1>(h, dx) : pool.template add<2>(h, dx);
  }

 protected:
  // The first one, number 0, is behind `fresh_`.
  float* numbered(int64_t line) const { return fresh_ + (1 + line) * t_.out_width * t_.channels; }

  const Task& t_;
  const T* image_;
  const PoolGradient<T> dy_;
  float* fresh_;      // a line
  int64_t next_ = 0;  // row of windows
};

// Room for a pool's backward with so many numbered lines.
PDARTS_INLINE int64_t pool_floats(const Task& t, int64_t lines) {
  return (1 + lines) * t.out_width * t.channels + 2 * t.channels;
}

// Gradient of average pools.
template <class T>
class AverageBackward : public PoolBackward<T, AverageBackward<T>> {
  using Base = PoolBackward<T, AverageBackward<T>>;
  friend Base;
  using Base::t_, Base::image_, Base::dy_, Base::fresh_, Base::next_;

 public:
  static constexpr int64_t kLines = 3;

  AverageBackward(const Task& t, const T* image, int64_t n, float* room) : Base(t, kAvgPool, image, n, room) {}

 private:
  // dy of a row of windows, each divided by its area.
  float* line(int64_t row) const { return Base::numbered(row % 3); }

  template <int S>
  PDARTS_INLINE_METHOD void windows(int64_t row) {
    dy_.fill(row, fresh_);
    const float height = inverse_extent(row * S, t_.in_height);
    const float inner = height * inverse_extent(1, 3);
    const int64_t last_inside = (t_.in_width - 2) / S;
    for (int64_t c = 0; c < t_.channels; c += V) {
      const Vec of_y = load(dy_.of_y + c);
      const float* from = fresh_ + c * t_.out_width;
      float* to = line(row) + c * t_.out_width;
      const T* centre = image_ + row * S * t_.in_width * t_.x_stride + c;
      pool_windows<S>(t_, centre, PoolRows(t_, row * S), height,
                      [&](int64_t w, int, Vec, Vec mean) PDARTS_LAMBDA {
                        const bool inside = w > 0 && w <= last_inside;
                        const float area = inside ? inner : height * inverse_extent(w * S, t_.in_width);
                        store(to + w * V, (load(from + w * V) + of_y * as_stored<T>(mean)) * area);
                      });
    }
  }

  template <int S>
  PDARTS_INLINE_METHOD void add(int64_t h, float* dx) {
    const int64_t first = h < 1 ? 0 : (h - 2 + S) / S, last = last_window(t_, S, h);
    for (; next_ <= last; ++next_) windows<S>(next_);
    if (last == first) sum<S, 1>(first, dx);
    else if (last == first + 1) sum<S, 2>(first, dx);
    else sum<S, 3>(first, dx);
  }

  // dx += what N rows of windows give.
  template <int S, int N>
  PDARTS_INLINE_METHOD void sum(int64_t first, float* dx) {
    const int64_t width = t_.out_width, in_width = t_.in_width, channels = t_.channels;
    for (int64_t c = 0; c < channels; c += V) {
      const float* from[N];
      for (int i = 0; i < N; ++i) from[i] = line(first + i) + c * width;
      const auto column = [&](int64_t w) PDARTS_LAMBDA {
        Vec sum = load(from[0] + w * V);
        PDARTS_UNROLL
        for (int i = 1; i < N; ++i) sum += load(from[i] + w * V);
        return sum;
      };
      const auto add_pixel = [&](int64_t w, Vec d) PDARTS_LAMBDA {
        float* to = dx + w * channels + c;
        store(to, load(to) + d);
      };
      Vec left{}, middle = column(0);
      for (int64_t w = 0; w < width; ++w) {
        const Vec right = w + 1 < width ? column(w + 1) : Vec{};
        if (S == 1) add_pixel(w, left + middle + right);
        if (S == 2) add_pixel(2 * w, middle);
        if (S == 2 && 2 * w + 1 < in_width) add_pixel(2 * w + 1, middle + right);
        left = middle;
        middle = right;
      }
    }
  }
};

// Gradient of maximum pools. The first maximum in row-major order takes all, as in torch: the first of three
// rows whose own maximum is that of the window, and in it the first pixel. So what windows give a row is summed
// before pixels are compared.
template <class T>
class MaximumBackward : public PoolBackward<T, MaximumBackward<T>> {
  using Base = PoolBackward<T, MaximumBackward<T>>;
  friend Base;
  using Base::t_, Base::image_, Base::dy_, Base::fresh_, Base::next_;

 public:
  static constexpr int64_t kLines = 6;

  MaximumBackward(const Task& t, const T* image, int64_t n, float* room) : Base(t, kMaxPool, image, n, room) {}

 private:
  // NaN is no maximum of anything, so pixels outside take no gradient.
  static Vec outside() { return broadcast(std::numeric_limits<float>::quiet_NaN()); }

  // Maximum of three pixels, of which the middle one is inside.
  static PDARTS_INLINE_METHOD Vec most(Vec first, Vec middle, Vec last) {
    return maximum(first, maximum(last, middle));
  }

  // Maxima of a row of x, three columns each, and what windows give them.
  float* maxima(int64_t h) const { return Base::numbered((h + 3) % 3); }
  float* given(int64_t h) const { return Base::numbered(3 + (h + 3) % 3); }

  template <int S>
  PDARTS_INLINE_METHOD void enter_row(int64_t h) {
    const int64_t count = t_.out_width * t_.channels, width = t_.in_width, stride = t_.x_stride;
    if (h <= 0) std::memset(given(h), 0, static_cast<size_t>(count) * sizeof(float));
    if (h < 0 || h >= t_.in_height) {
      for (int64_t i = 0; i < count; i += V) store(maxima(h) + i, outside());
      return;
    }
    for (int64_t c = 0; c < t_.channels; c += V) {
      const T* x = image_ + h * width * stride + c;
      float* to = maxima(h) + c * t_.out_width;
      Vec left = outside(), middle = load(x);
      const auto window = [&](int64_t w, bool has_right) PDARTS_LAMBDA {
        if (S == 2) middle = load(x + 2 * w * stride);
        const Vec right = has_right ? load(x + (w * S + 1) * stride) : outside();
        store(to + w * V, most(left, middle, right));
        left = S == 1 ? middle : right;
        middle = right;
      };
      int64_t w = 0;
      for (; w * S + 1 < width; ++w) window(w, true);
      if (w < t_.out_width) window(w, false);
    }
  }

  template <int S>
  PDARTS_INLINE_METHOD void windows(int64_t row) {
    for (; newest_ <= row * S + 1; ++newest_) enter_row<S>(newest_);
    dy_.fill(row, fresh_);
    const float *x[3] = {maxima(row * S - 1), maxima(row * S), maxima(row * S + 1)};
    float* to[3] = {given(row * S - 1), given(row * S), given(row * S + 1)};
    for (int64_t c = 0; c < t_.channels; c += V) {
      const Vec of_y = load(dy_.of_y + c);
      const int64_t begin = c * t_.out_width, end = begin + t_.out_width * V;
      for (int64_t i = begin; i < end; i += V) {
        const Vec above = load(x[0] + i), centre = load(x[1] + i);
        const Vec top = most(above, centre, load(x[2] + i));
        const Vec dy = load(fresh_ + i) + of_y * top;
        const auto is_above = above == top, is_centre = centre == top;
        const Vec rest = is_above ? Vec{} : dy;
        store(to[0] + i, load(to[0] + i) + (is_above ? dy : Vec{}));
        const Vec of_centre = is_centre ? rest : Vec{};
        // Rows that no earlier window is part of.
        store(to[1] + i, S == 1 ? load(to[1] + i) + of_centre : of_centre);
        store(to[2] + i, is_centre ? Vec{} : rest);
      }
    }
  }

  template <int S>
  PDARTS_INLINE_METHOD void add(int64_t h, float* dx) {
    for (const int64_t last = last_window(t_, S, h); next_ <= last; ++next_) windows<S>(next_);
    const int64_t width = t_.in_width, windows = t_.out_width, channels = t_.channels, stride = t_.x_stride;
    for (int64_t c = 0; c < channels; c += V) {
      const T* x = image_ + h * width * stride + c;
      const float *most = maxima(h) + c * windows, *give = given(h) + c * windows;
      const auto add_pixel = [&](int64_t w, Vec d) PDARTS_LAMBDA {
        float* to = dx + w * channels + c;
        store(to, load(to) + d);
      };
      Vec left = outside(), middle = load(x);
      Vec to_left{}, to_middle{};
      for (int64_t w = 0; w < windows; ++w) {
        if (S == 2) middle = load(x + 2 * w * stride);
        const Vec top = load(most + w * V), all = load(give + w * V);
        const auto is_left = left == top, is_middle = middle == top;
        const Vec rest = is_left ? Vec{} : all;
        to_left += is_left ? all : Vec{};
        to_middle += is_middle ? rest : Vec{};
        const Vec to_right = is_middle ? Vec{} : rest;
        if (w > 0) add_pixel(w * S - 1, to_left);
        if (S == 2) add_pixel(2 * w, to_middle);
        left = middle;
        to_left = S == 1 ? to_middle : to_right;
        to_middle = S == 1 ? to_right : Vec{};
        const int64_t next = w * S + 1;
        if (next < width) (S == 1 ? middle : left) = load(x + next * stride);
      }
      if (windows * S - 1 < width) add_pixel(windows * S - 1, to_left);
    }
  }

  int64_t newest_ = -1;  // row of x
};

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
