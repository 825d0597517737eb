// What enters a node, as mix and reduce read it: y of an operation, or x of a skip.
#pragma once

#include "pooling.h"
#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Branches that are read side by side: their sums and factors stay in registers, and what they have
// in common is loaded once.
constexpr int kTogether = kManyRegisters ? 8 : 2;

// Numbers of an operand that are read before the next ones.
constexpr int64_t kWindowNumbers = 512;

// Rows of one image: pixel p begins at data + p * stride.
template <class T>
struct Entering {
  const T* data;
  int64_t stride;

  // Asks for what is read 512 numbers after channel c of pixel p.
  PDARTS_INLINE_METHOD void ask_ahead(int64_t p, int64_t c) const {
    ask_for(data + p * stride + c + 512);
  }
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

// The task as a pool that is stored nowhere sees it.
PDARTS_INLINE Task pool_task(const Task& t, const Branch& b) {
  Task pool = t;
  pool.in_height = b.input_height;
  pool.in_width = b.input_width;
  pool.x_stride = b.input_stride;
  return pool;
}

// Pools that are stored nowhere of one source, which are computed together; not both are null.
struct Pools {
  const Branch *most, *mean;

  const Branch& any() const { return most ? *most : *mean; }

  // Takes a branch in if it is of the same source, and its place is free.
  bool take(const Branch& b) {
    const Branch*& place = b.kind == kMaxPool ? most : mean;
    const Branch* other = b.kind == kMaxPool ? mean : most;
    if (place || (other && (other->input != b.input || other->stride != b.stride))) return false;
    place = &b;
    return true;
  }
};

// f(Int<whether there is a maximum>, Int<whether there is a mean>).
template <class F>
PDARTS_INLINE void with_pools(const Pools& pools, F f) {
  if (pools.most && pools.mean) f(Int<1>{}, Int<1>{});
  else if (pools.most) f(Int<1>{}, Int<0>{});
  else f(Int<0>{}, Int<1>{});
}

// What enters a node, by how it is read, in the order in which it is summed: pools come at the same
// place whether they are stored or not.
struct Entrants {
  template <class X>
  struct List {
    X* first;
    int64_t count = 0;

    void add(X x) { first[count++] = x; }
    X* begin() const { return first; }
    X* end() const { return first + count; }
  };

  List<const Branch*> dropped;  // with dropout
  List<Pools> pools;            // computed anew
  List<const Branch*> plain;    // as it is

  // The lists lie in `room`.
  Entrants(const Task& t, Scratch& room) {
    const int64_t most = t.num_branches;
    room.reset(2 * Scratch::bytes_for<const Branch*>(most) + Scratch::bytes_for<Pools>(most));
    dropped.first = room.take<const Branch*>(most);
    pools.first = room.take<Pools>(most);
    plain.first = room.take<const Branch*>(most);
    for (int64_t i = 0; i < t.num_branches; ++i)
      if (is_pool(t.branches[i].kind)) add_pool(t.branches[i]);
    for (int64_t i = 0; i < t.num_branches; ++i) {
      const Branch& b = t.branches[i];
      if (is_pool(b.kind)) continue;
      const bool drops = b.kind == kSkip && (b.mask || b.stream >= 0);
      (drops ? dropped : plain).add(&b);
    }
  }

 private:
  void add_pool(const Branch& b) {
    if (!is_recomputed(b)) return plain.add(&b);
    for (Pools& some : pools)
      if (some.take(b)) return;
    Pools some{};
    some.take(b);
    pools.add(some);
  }
};

// f(first pixel, last, channel block): pixels in windows, and within one, block by block. Memory arrives
// faster in its order than with a block's lines of a long run first.
template <class F>
PDARTS_INLINE void in_windows(int64_t pixels, int64_t channels, F f) {
  const int64_t window = channels == V ? pixels : max_of(kWindowNumbers / channels, 2);
  for (int64_t first = 0; first < pixels; first += window) {
    const int64_t last = min_of(first + window, pixels);
    for (int64_t c = 0; c < channels; c += V) f(first, last, c);
  }
}

// f(first of some plain branches, Int<how many>) for all of them: as many at a time as fit.
template <int N = kTogether, class F>
PDARTS_INLINE void together(const Branch* const* first, int64_t left, F f) {
  if constexpr (N > 0) {
    for (; left >= N; first += N, left -= N) f(first, Int<N>{});
    together<N / 2>(first, left, f);
  }
}

template <class F>
PDARTS_INLINE void together(const Entrants& all, F f) {
  together(all.plain.first, all.plain.count, f);
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
