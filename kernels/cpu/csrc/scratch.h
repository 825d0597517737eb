// Memory that outlives a call, and the padded planes that the stencils read.
#pragma once

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ahead.h"

namespace pdarts {

// What a Plane has; the same in every variant.
struct PlaneData {
  float* data;
  int64_t height, width, pad, stride, plane;
};

namespace PDARTS_VARIANT {

// Stencils compute whole blocks of columns: they may read, never use, this far beyond a plane.
constexpr int64_t kSlack = 64 * V;

// Memory whose pages are small costs a walk through their tables every few rows of an image.
constexpr int64_t kHugePage = int64_t{1} << 21;

// A bump allocator over one block a thread. The block only grows: allocating it anew for every
// call costs more in page faults than a small cell computes.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  // Starts over with room for `bytes`; earlier pointers become invalid.
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(block_);
    const int64_t unit = bytes < kHugePage / 4 ? 64 : kHugePage;
    size_ = (bytes + unit - 1) / unit * unit;
    block_ = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(size_)));
    if (!block_) std::abort();
#ifdef MADV_HUGEPAGE
    if (unit == kHugePage) madvise(block_, static_cast<size_t>(size_), MADV_HUGEPAGE);
#endif
  }

  template <class T>
  T* take(int64_t count) {
    char* p = block_ + used_;
    used_ += bytes_for<T>(count);
    if (used_ > size_) std::abort();
    return reinterpret_cast<T*>(p);
  }

  template <class T>
  static int64_t bytes_for(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* block_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

// One image, zero-padded, as [C / V][height + 2 pad][width + 2 pad][V].
struct Plane : PlaneData {
  static int64_t floats(int64_t height, int64_t width, int64_t pad, int64_t blocks) {
    return blocks * (height + 2 * pad) * (width + 2 * pad) * V + kSlack;
  }

  static Plane make(Scratch& scratch, int64_t height, int64_t width, int64_t pad, int64_t blocks) {
    const int64_t count = floats(height, width, pad, blocks);
    Plane p{{scratch.take<float>(count), height, width, pad, (width + 2 * pad) * V, 0}};
    p.plane = (height + 2 * pad) * p.stride;
    std::memset(p.data, 0, static_cast<size_t>(count) * sizeof(float));
    return p;
  }

  float* at(int64_t block, int64_t row, int64_t column) const {
    return data + block * plane + (row + pad) * stride + (column + pad) * V;
  }
};

// Offsets of every pixel of the image within a channel block, row-major.
PDARTS_INLINE void pixel_places(const Plane& plane, int32_t* places) {
  for (int64_t row = 0; row < plane.height; ++row)
    for (int64_t column = 0; column < plane.width; ++column)
      *places++ = static_cast<int32_t>(plane.at(0, row, column) - plane.data);
}

// Images of a group: what one thread works on at a time. The number of groups follows from the
// batch alone, never from the threads, so sums are the same at every number of threads.
struct Range {
  int64_t begin, end;
};

PDARTS_INLINE Range group_range(const Task& task, int64_t group) {
  return {group * task.images / task.groups, (group + 1) * task.images / task.groups};
}

// The image that a thread works on after image n of a group: threads take groups in turns.
PDARTS_INLINE int64_t image_after(const Task& task, int64_t group, int64_t n) {
  if (n + 1 < group_range(task, group).end) return n + 1;
  const int64_t next = group + task.threads;
  return next < task.groups ? group_range(task, next).begin : n;
}

// Rows of the output that are computed together: about 64 pixels stay in the first-level cache.
PDARTS_INLINE int64_t rows_per_chunk(const Task& task) {
  const int64_t rows = 64 / task.out_width;
  return rows < 1 ? 1 : rows;
}

// Rows of the output that hold about `count` numbers.
PDARTS_INLINE int64_t rows_per_run(const Task& task, int64_t count) {
  const int64_t rows = count / (task.channels * task.out_width);
  return rows < 1 ? 1 : rows < task.out_height ? rows : task.out_height;
}

PDARTS_INLINE int64_t chunk_pixels(const Task& task) {
  return rows_per_chunk(task) * task.out_width;
}

PDARTS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

PDARTS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// to [count] = from, which nobody needs soon: past the caches where that is possible.
template <class T>
PDARTS_INLINE void write_out(T* to, const T* from, int64_t count) {
  constexpr int64_t kNumbers = V * static_cast<int64_t>(sizeof(float) / sizeof(T));
  int64_t i = 0;
  if (can_stream(to))
    for (; i + kNumbers <= count; i += kNumbers)
      stream_any(to + i, *reinterpret_cast<const AnyVec*>(from + i));
  std::memcpy(to + i, from + i, static_cast<size_t>(count - i) * sizeof(T));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
