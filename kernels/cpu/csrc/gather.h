// What a convolution that is one matrix product reads, as rows of a matrix: relu(x) of the pixels of
// a 1x1 convolution or a factorized reduce, patches of an image.
#pragma once

#include "inputs.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// The arrays in which the channels of x lie, with `channels` each: one behind the other.
struct Parts {
  int64_t count, channels, step;

  static Parts of(const Task& t) {
    return {t.in_parts, t.in_channels / t.in_parts, t.images * t.in_height * t.in_width * t.x_stride};
  }

  // f(first channel, elements to its array).
  template <class F>
  PDARTS_INLINE_METHOD void each(F f) const {
    for (int64_t i = 0; i < count; ++i) f(i * channels, i * step);
  }
};

// Where output pixel (row, column) reads phase 0 or 1 of a factorized reduce; -1 if outside.
PDARTS_INLINE int64_t factorized_source(const Task& t, int64_t row, int64_t column,
                                        int64_t phase) {
  const int64_t h = 2 * row + phase, w = 2 * column + phase;
  return h < t.in_height && w < t.in_width ? h * t.in_width + w : -1;
}

// Depth of the matrix product of a kPointwise, kFactorized or kPatches branch.
PDARTS_INLINE int64_t gather_depth(const Task& t, const Branch& b) {
  if (b.kind == kPatches) return (b.kernel * b.kernel * t.in_channels + V - 1) / V * V;
  return b.kind == kFactorized ? 2 * t.in_channels : t.in_channels;
}

// Where row `row` of a factorized reduce's weights lies in a matrix [C, 2 Cx] with zeros for the
// phase that it does not read.
PDARTS_INLINE int64_t factorized_place(const Task& t, int64_t row) {
  return (2 * row + (row >= t.real_channels / 2)) * t.in_channels;
}

// The weights of a kFactorized branch as such a matrix.
PDARTS_INLINE void expand_weights(const Task& t, const Branch& b, float* dense) {
  const int64_t cx = t.in_channels, even = t.real_channels / 2;
  const float* odd = b.pointwise_odd ? b.pointwise_odd : b.pointwise + even * cx;
  std::memset(dense, 0, static_cast<size_t>(2 * cx * t.channels) * sizeof(float));
  for (int64_t row = 0; row < t.channels; ++row)
    std::memcpy(dense + factorized_place(t, row),
                row < even ? b.pointwise + row * cx : odd + (row - even) * cx,
                static_cast<size_t>(cx) * sizeof(float));
}

// a [rows * out_width, depth] = patches of an image, output rows [begin, end). Both are accessed up to
// a vector further than that; what is behind a patch in `a` is overwritten by the next one.
template <class T, class E>
PDARTS_SHARED void gather_patches(const Task& t, const Branch& b, const T* image, int64_t begin,
                                  int64_t end, E* a) {
  const int64_t run = b.kernel * t.in_channels, depth = gather_depth(t, b);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < t.out_width; ++column, a += depth) {
      for (int64_t line = 0; line < b.kernel; ++line) {
        const T* x = image + ((row + line) * t.in_width + column) * t.x_stride;
        for (int64_t i = 0; i < run; i += V) store(a + line * run + i, load(x + i));
      }
      std::memset(a + b.kernel * run, 0, static_cast<size_t>(depth - b.kernel * run) * sizeof(E));
    }
}

// to [count] = relu(from) of a pixel.
template <class T, class E>
PDARTS_INLINE void copy_rectified(const T* from, int64_t count, E* to) {
  for (int64_t c = 0; c < count; c += V) store(to + c, relu(load(from + c)));
}

#ifdef PDARTS_BF16
PDARTS_INLINE void copy_rectified(const BFloat* from, int64_t count, BFloat* to) {
  for (int64_t c = 0; c < count; c += 2 * V) {
    const __mmask32 there = count - c < 2 * V ? 0xffffu : 0xffffffffu;
    _mm512_mask_storeu_epi16(to + c, there, rectified(_mm512_maskz_loadu_epi16(there, from + c)));
  }
}
#endif

// to [Cx] = relu(from) of a pixel.
template <class T, class E>
PDARTS_INLINE void copy_pixel(const Parts& parts, const T* from, E* to) {
#ifdef PDARTS_BF16
  if constexpr (std::is_same<T, BFloat>::value)
    if (parts.channels == V && parts.count % 2 == 0) {
      for (int64_t i = 0; i < parts.count; i += 2, from += 2 * parts.step, to += 2 * V)
        store(to, rectified(join(channels_of(from), channels_of(from + parts.step))));
      return;
    }
#endif
  parts.each([&](int64_t channel, int64_t offset) PDARTS_LAMBDA {
    copy_rectified(from + offset, parts.channels, to + channel);
  });
}

// a [rows * out_width, depth] = what output rows [begin, end) of an image read.
template <class T, class E>
PDARTS_INLINE void gather(const Task& t, const Branch& b, const T* image, int64_t begin,
                          int64_t end, E* a) {
  if (b.kind == kPatches) return gather_patches(t, b, image, begin, end, a);
  const int64_t phases = b.kind == kFactorized ? 2 : 1;
  const Parts parts = Parts::of(t);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < t.out_width; ++column)
      for (int64_t phase = 0; phase < phases; ++phase, a += t.in_channels) {
        const int64_t pixel = phases == 2 ? factorized_source(t, row, column, phase)
                                          : row * t.out_width + column;
        if (pixel < 0) std::memset(a, 0, static_cast<size_t>(t.in_channels) * sizeof(E));
        else copy_pixel(parts, image + pixel * t.x_stride, a);
      }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
