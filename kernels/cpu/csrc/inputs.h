// What convolutions read of an image, a channel block at a time.
//
// By value: the compiler would load what a reference leads to anew after every number that is written.
#pragma once

#include "lines.h"
#include "product.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// relu(x), pixel by pixel.
template <class T>
struct RectifiedInput {
  const T* x;
  int64_t stride;

  static RectifiedInput of(const T* image, int64_t stride, int64_t block) {
    return {image + block * V, stride};
  }

  PDARTS_INLINE_METHOD Vec operator()(int64_t p) const { return relu(load(x + p * stride)); }
};

// The same of a second half: relu(x * scale + shift).
template <class T>
struct NormalisedInput {
  const T* x;
  int64_t stride;
  Vec scale, shift;

  static NormalisedInput of(const T* image, const Branch& b, int64_t block) {
    return {image + block * V, b.input_stride, load(b.scale + block * V), load(b.shift + block * V)};
  }

  PDARTS_INLINE_METHOD Vec operator()(int64_t p) const { return relu(load(x + p * stride) * scale + shift); }
};

#ifdef PDARTS_BF16
// relu of two vectors as they are stored: without a sign, or above minus infinity, which NaN is.
PDARTS_INLINE __m512i rectified(__m512i x) {
  const __m512i minus_infinity = _mm512_set1_epi16(static_cast<int16_t>(0xff80));
  return _mm512_maskz_mov_epi16(~_mm512_movepi16_mask(x) | _mm512_cmpgt_epu16_mask(x, minus_infinity), x);
}

// Two pixels, rounded.
template <class F>
PDARTS_INLINE __m512i both_pixels(const F& f, int64_t first, int64_t second) {
  return as_line(f(first), f(second));
}

// They are as they are stored.
PDARTS_INLINE __m512i both_pixels(const RectifiedInput<BFloat>& f, int64_t first, int64_t second) {
  return rectified(join(channels_of(f.x + first * f.stride), channels_of(f.x + second * f.stride)));
}
#endif

// plane = f(channel block)(pixel) over every pixel of the image.
template <class F>
PDARTS_INLINE void fill(const Plane& plane, int64_t blocks, F f) {
  const int64_t height = plane.height, width = plane.width;
  for (int64_t row = 0; row < height; ++row)
    for (int64_t block = 0; block < blocks; ++block) {
      float* p = plane.at(block, row, 0);
      const auto of_block = f(block);
      for (int64_t column = 0; column < width; ++column)
        store(p + column * V, of_block(row * width + column));
    }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
