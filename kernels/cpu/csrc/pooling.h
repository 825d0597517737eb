// 3x3 pooling with padding 1 of one channels-last image, and its backward.
#pragma once

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Rows and columns of the window of output pixel (row, column) that lie inside the image.
struct Window {
  int64_t top, bottom, left, right;
};

PDARTS_INLINE Window window(const Task& t, int64_t stride, int64_t row, int64_t column) {
  const int64_t h = row * stride, w = column * stride;
  return {h > 0 ? h - 1 : 0, min_of(h + 2, t.in_height), w > 0 ? w - 1 : 0,
          min_of(w + 2, t.in_width)};
}

PDARTS_INLINE Vec vec_max(Vec a, Vec b) {
  // NaN wins, as in torch.
  return b > a || b != b ? b : a;
}

// y rows [begin, end) of a kMaxPool or kAvgPool branch.
template <class T>
PDARTS_INLINE void pool_rows(const Task& t, const Branch& b, const T* image, int64_t begin,
                             int64_t end, T* y) {
  const int64_t channels = t.channels;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < t.out_width; ++column) {
      const Window s = window(t, b.stride, row, column);
      T* out = y + (row * t.out_width + column) * channels;
      const float area = 1.0f / static_cast<float>((s.bottom - s.top) * (s.right - s.left));
      for (int64_t c = 0; c < channels; c += V) {
        const T* x = image + c;
        Vec value = b.kind == kMaxPool ? load(x + (s.top * t.in_width + s.left) * t.x_stride)
                                       : Vec{};
        for (int64_t h = s.top; h < s.bottom; ++h)
          for (int64_t w = s.left; w < s.right; ++w) {
            const Vec v = load(x + (h * t.in_width + w) * t.x_stride);
            value = b.kind == kMaxPool ? vec_max(value, v) : value + v;
          }
        store(out + c, b.kind == kMaxPool ? value : value * area);
      }
    }
}

// dx [in pixels, C] += gradient of the pool for dy [out pixels, C]. The first maximum of a window
// in row-major order takes all of it, as in torch.
template <class T>
PDARTS_INLINE void pool_backward(const Task& t, const Branch& b, const T* image, const float* dy,
                                 float* dx) {
  const int64_t channels = t.channels;
  for (int64_t row = 0; row < t.out_height; ++row)
    for (int64_t column = 0; column < t.out_width; ++column, dy += channels) {
      const Window s = window(t, b.stride, row, column);
      const float area = 1.0f / static_cast<float>((s.bottom - s.top) * (s.right - s.left));
      for (int64_t c = 0; c < channels; c += V) {
        Vec left = load(dy + c);
        if (b.kind == kAvgPool) {
          left *= area;
          for (int64_t h = s.top; h < s.bottom; ++h)
            for (int64_t w = s.left; w < s.right; ++w) {
              float* d = dx + (h * t.in_width + w) * channels + c;
              store(d, load(d) + left);
            }
          continue;
        }
        const T* x = image + c;
        Vec value = load(x + (s.top * t.in_width + s.left) * t.x_stride);
        for (int64_t h = s.top; h < s.bottom; ++h)
          for (int64_t w = s.left; w < s.right; ++w)
            value = vec_max(value, load(x + (h * t.in_width + w) * t.x_stride));
        for (int64_t h = s.top; h < s.bottom; ++h)
          for (int64_t w = s.left; w < s.right; ++w) {
            const Vec v = load(x + (h * t.in_width + w) * t.x_stride);
            float* d = dx + (h * t.in_width + w) * channels + c;
            store(d, load(d) + (v == value ? left : Vec{}));
            left = v == value ? Vec{} : left;
          }
      }
    }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
