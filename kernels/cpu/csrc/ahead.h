// Memory that is asked for before it is needed.
#pragma once

#include "simd.h"

namespace pdarts {

// What Ahead and Aheads have; the same in every variant.
struct AheadData {
  const char* data;
  int64_t pixel_bytes;
  int block_bits, line_bits;  // of the bytes of a channel block, of blocks in a line
};

struct AheadsData {
  AheadData all[4];
  int count = 0;
};

namespace PDARTS_VARIANT {

// Asks for a line, into the second-level cache: the first one is full of what is computed with, and has
// room for fewer lines on their way (3 to 5 % of a pass on Zen 4).
PDARTS_INLINE void ask_for(const void* line) { __builtin_prefetch(line, 0, 2); }

// Rows of storage that the next chunk of pixels reads. Asking for all of them at once waits for the
// memory as reading them does; asked for one by one between the tiles of a product, they arrive
// while it computes.
struct Ahead : AheadData {
  // Of a power of two: to divide takes longer than to ask.
  static constexpr int bits(int64_t size) { return size > 1 ? 1 + bits(size / 2) : 0; }

  template <class T>
  static Ahead of(const T* first, int64_t stride) {
    constexpr int64_t kSize = sizeof(T);
    constexpr int kLineBits = bits(64 / (V * kSize));
    return {{reinterpret_cast<const char*>(first), stride * kSize, bits(64) - kLineBits, kLineBits}};
  }

  Ahead from(int64_t pixel) const { return {{data + pixel * pixel_bytes, pixel_bytes, block_bits, line_bits}}; }

  PDARTS_INLINE_METHOD void ask(int64_t pixel, int64_t block) const {
    ask_for(data + pixel * pixel_bytes + (block << block_bits));
  }

  // A block's share of the lines of pixels [first, first + count).
  PDARTS_INLINE_METHOD void ask_share(int64_t first, int64_t count, int64_t block) const {
    if (pixel_bytes < 64) return ask_all(first, count);
    const int64_t share = count >> line_bits, number = block & ((int64_t{1} << line_bits) - 1);
    const char* p = data + (first + number * share) * pixel_bytes + (block >> line_bits) * 64;
    for (int64_t i = 0; i < share; ++i, p += pixel_bytes) ask_for(p);
  }

  // The first block of pixels [first, first + count), a line once.
  PDARTS_INLINE_METHOD void ask_all(int64_t first, int64_t count) const {
    const char* end = data + (first + count) * pixel_bytes;
    const int64_t step = pixel_bytes < 64 ? 64 : pixel_bytes;
    for (const char* p = data + first * pixel_bytes; p < end; p += step) ask_for(p);
  }
};

// Asks for nothing.
struct NothingAhead {
  void ask(int64_t, int64_t) const {}
};

// Two things that are asked for together.
template <class First, class Second>
struct BothAhead {
  First first;
  Second second;

  PDARTS_INLINE_METHOD void ask(int64_t pixel, int64_t block) const {
    first.ask(pixel, block);
    second.ask(pixel, block);
  }
};

template <class First, class Second>
BothAhead(First, Second) -> BothAhead<First, Second>;

// The same for a number that is known when the program runs.
struct Aheads : AheadsData {
  static Aheads of(const Ahead& one) { return {{{one}, 1}}; }

  void add(const Ahead& one) { all[count++] = one; }

  PDARTS_INLINE_METHOD void ask_all(int64_t first, int64_t pixels) const {
    for (int i = 0; i < count; ++i) Ahead{all[i]}.ask_all(first, pixels);
  }
};

// A block's share of the lines of pixels [first, first + pixels). Out of the way of loops that need all registers.
PDARTS_SHARED void ask_share(const Aheads& aheads, int64_t first, int64_t pixels, int64_t block) {
  for (int i = 0; i < aheads.count; ++i) Ahead{aheads.all[i]}.ask_share(first, pixels, block);
}

// A convolution is a stencil and a product. What follows is asked for in one of them: no more than some
// lines can be on their way, and a product on tiles is over before they arrive.
#ifdef PDARTS_AMX
constexpr bool kAskInStencils = true;
#else
constexpr bool kAskInStencils = false;
#endif

// `ahead`, or nothing.
template <bool kHere, class A>
PDARTS_INLINE auto ahead_if(const A& ahead) {
  if constexpr (kHere) return ahead;
  else return NothingAhead{};
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
