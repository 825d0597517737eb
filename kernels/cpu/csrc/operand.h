// What enters a node, as mix and reduce read it: y of an operation, or x of a skip.
#pragma once

#include "simd.h"

namespace pdarts {
namespace PDARTS_VARIANT {

template <class T>
PDARTS_INLINE const T* operand(const Branch& b) {
  return static_cast<const T*>(b.kind == kSkip ? b.input : b.y);
}

PDARTS_INLINE int64_t operand_stride(const Task& t, const Branch& b) {
  return b.kind == kSkip ? b.input_stride : t.channels;
}

// What is read after branch i for the pixels from `first` on: the next branch, or the first one for
// the pixels that follow.
template <class T>
PDARTS_INLINE Ahead operand_ahead(const Task& t, int64_t i, int64_t first, int64_t pixels) {
  const bool last = i + 1 == t.num_branches;
  const Branch& next = t.branches[last ? 0 : i + 1];
  const int64_t stride = operand_stride(t, next);
  return Ahead::of(operand<T>(next) + (last ? first + pixels : first) * stride, stride);
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
