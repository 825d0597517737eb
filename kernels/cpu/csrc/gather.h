// relu(x) of the pixels that a 1x1 convolution or a factorized reduce reads, as rows of a matrix.
#pragma once

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Where output pixel (row, column) reads phase 0 or 1 of a factorized reduce; -1 if outside.
PDARTS_INLINE int64_t factorized_source(const Task& t, int64_t row, int64_t column,
                                        int64_t phase) {
  const int64_t h = 2 * row + phase, w = 2 * column + phase;
  return h < t.in_height && w < t.in_width ? h * t.in_width + w : -1;
}

// Depth of the matrix product of a kPointwise or kFactorized branch.
PDARTS_INLINE int64_t gather_depth(const Task& t, const Branch& b) {
  return b.kind == kFactorized ? 2 * t.in_channels : t.in_channels;
}

// The weights of a kPointwise or kFactorized branch as one matrix [C, depth]: a factorized reduce
// has zeros where a row does not read a phase.
PDARTS_INLINE void expand_weights(const Task& t, const Branch& b, float* dense) {
  const int64_t cx = t.in_channels, depth = gather_depth(t, b), split = t.real_channels / 2;
  for (int64_t row = 0; row < t.channels; ++row)
    for (int64_t k = 0; k < depth; ++k) {
      const bool reads = depth == cx || (k >= cx) == (row >= split);
      dense[row * depth + k] = reads ? b.pointwise[row * cx + k % cx] : 0.0f;
    }
}

// Element j of the dense matrix's gradient back to where the weight lies; -1 for a zero.
PDARTS_INLINE int64_t weight_index(const Task& t, const Branch& b, int64_t j) {
  if (b.kind != kFactorized) return j;
  const int64_t cx = t.in_channels, row = j / (2 * cx), k = j % (2 * cx);
  return (k >= cx) == (row >= t.real_channels / 2) ? row * cx + k % cx : -1;
}

// a [rows * out_width, depth] = relu(x) of output rows [begin, end) of an image.
template <class T>
PDARTS_INLINE void gather(const Task& t, const Branch& b, const T* image, int64_t begin,
                          int64_t end, float* a) {
  const int64_t phases = b.kind == kFactorized ? 2 : 1;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < t.out_width; ++column)
      for (int64_t phase = 0; phase < phases; ++phase, a += t.in_channels) {
        const int64_t pixel = phases == 2 ? factorized_source(t, row, column, phase)
                                          : row * t.out_width + column;
        const T* x = image + pixel * t.x_stride;
        for (int64_t c = 0; c < t.in_channels; c += V)
          store(a + c, pixel < 0 ? Vec{} : relu(load(x + c)));
      }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
