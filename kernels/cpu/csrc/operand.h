// What enters a node, as mix and reduce read it: y of an operation, or x of a skip.
#pragma once

#include "pooling.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Rows of one image: pixel p begins at data + p * stride.
template <class T>
struct Entering {
  const T* data;
  int64_t stride;
};

// Row `row` of image n of a branch, or what a pool that is stored nowhere computes it from.
template <class T>
PDARTS_INLINE Entering<T> entering(const Task& t, const Branch& b, int64_t n, int64_t row) {
  if (is_recomputed(b))
    return {static_cast<const T*>(b.input) +
                (n * b.input_height + row * b.stride) * b.input_width * b.input_stride,
            b.input_stride};
  const bool skip = b.kind == kSkip;
  const int64_t stride = skip ? b.input_stride : t.channels;
  return {static_cast<const T*>(skip ? b.input : b.y) + (n * t.out_height + row) * t.out_width * stride,
          stride};
}

// What is read after branch i for rows [begin, end) of image n: the next branch, or the first one for
// the rows that follow.
template <class T>
PDARTS_INLINE Ahead entering_ahead(const Task& t, int64_t i, int64_t n, int64_t begin,
                                   int64_t end) {
  const bool last = i + 1 == t.num_branches;
  const Entering<T> next = entering<T>(t, t.branches[last ? 0 : i + 1], n, last ? end : begin);
  return Ahead::of(next.data, next.stride);
}

// The task as a pool that is stored nowhere sees it.
PDARTS_INLINE Task pool_task(const Task& t, const Branch& b) {
  Task pool = t;
  pool.in_height = b.input_height;
  pool.in_width = b.input_width;
  pool.x_stride = b.input_stride;
  return pool;
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
