// 3x3 pooling with padding 1 of one channels-last image, and its backward.
//
// All loops run tap by tap along a row: neighbouring windows overlap, and a window after window
// order would wait for its own stores.
#pragma once

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// f(tap, pixel of the tap for column 0, first column, last column + 1) for every tap of the
// windows of an output row that lies inside the image.
template <class F>
PDARTS_INLINE void for_each_tap(const Task& t, int64_t stride, int64_t row, F f) {
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t h = row * stride + i - 1;
    if (h < 0 || h >= t.in_height) continue;
    for (int64_t j = 0; j < 3; ++j) {
      const int64_t last = t.in_width < j ? 0 : (t.in_width - j) / stride + 1;
      f(i * 3 + j, h * t.in_width + j - 1, j == 0 ? 1 : 0, min_of(last, t.out_width));
    }
  }
}

// values [out_width] *= 1 / (pixels of the window inside the image).
PDARTS_INLINE void divide_by_area(const Task& t, int64_t stride, int64_t row, float* values) {
  const int64_t h = row * stride;
  const int64_t height = min_of(h + 2, t.in_height) - (h > 0 ? h - 1 : 0);
  for (int64_t column = 0; column < t.out_width; ++column, values += t.channels) {
    const int64_t w = column * stride;
    const int64_t width = min_of(w + 2, t.in_width) - (w > 0 ? w - 1 : 0);
    const float inverse = 1.0f / static_cast<float>(height * width);
    for (int64_t c = 0; c < t.channels; c += V) store(values + c, load(values + c) * inverse);
  }
}

// y [out pixels, C] = rows [begin, end) of a kMaxPool or kAvgPool branch. `a` holds a row.
template <class T>
PDARTS_INLINE void pool_rows(const Task& t, const Branch& b, const T* image, int64_t begin,
                             int64_t end, float* a, T* y) {
  const int64_t channels = t.channels, step = b.stride * t.x_stride;
  const bool is_max = b.kind == kMaxPool;
  for (int64_t row = begin; row < end; ++row) {
    // Every window has its centre: start there for a maximum, at zero for a sum.
    const T* centre = image + row * b.stride * t.in_width * t.x_stride;
    for (int64_t w = 0; w < t.out_width; ++w)
      for (int64_t c = 0; c < channels; c += V)
        store(a + w * channels + c, is_max ? load(centre + w * step + c) : Vec{});
    for_each_tap(t, b.stride, row, [&](int64_t, int64_t pixel, int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) {
        const T* x = image + pixel * t.x_stride + w * step;
        float* o = a + w * channels;
        for (int64_t c = 0; c < channels; c += V) {
          const Vec v = load(x + c), old = load(o + c);
          store(o + c, is_max ? maximum(v, old) : old + v);
        }
      }
    });
    if (!is_max) divide_by_area(t, b.stride, row, a);
    T* out = y + (row - begin) * t.out_width * channels;
    for (int64_t i = 0; i < t.out_width * channels; i += V) store(out + i, load(a + i));
  }
}

// dx [in pixels, C] += gradient of the pool y for dy [out pixels, C], which is used up. The first
// maximum of a window in row-major order takes all of it, as in torch.
template <class T>
PDARTS_INLINE void pool_backward(const Task& t, const Branch& b, const T* image, const T* y,
                                 float* dy, float* dx) {
  const int64_t channels = t.channels, step = b.stride;
  for (int64_t row = 0; row < t.out_height; ++row) {
    float* left = dy + row * t.out_width * channels;
    const T* top = y + row * t.out_width * channels;
    if (b.kind == kAvgPool) divide_by_area(t, b.stride, row, left);
    for_each_tap(t, b.stride, row, [&](int64_t, int64_t pixel, int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) {
        float* d = dx + (pixel + w * step) * channels;
        float* g = left + w * channels;
        const T* x = image + (pixel + w * step) * t.x_stride;
        for (int64_t c = 0; c < channels; c += V) {
          const Vec rest = load(g + c);
          if (b.kind == kAvgPool) {
            store(d + c, load(d + c) + rest);
            continue;
          }
          const auto hit = load(x + c) == load(top + w * channels + c);
          store(d + c, load(d + c) + (hit ? rest : Vec{}));
          store(g + c, hit ? Vec{} : rest);
        }
      }
    });
  }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
