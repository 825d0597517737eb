// Depthwise convolutions of one image, as the primitives call them. Weights are packed [C / V][K * K][V].
//
// A variant that extends another one calls what that one has for float32, so stencils are compiled once a
// processor, and take nothing that is another type in another variant.
//
// depthwise_chunk: a [(end - begin) * width, channels] = rows [begin, end) of a branch's convolution of `src`. Asks
//   `ahead` for as many pixels.
// add_transposed: dx = the transposed convolution of `grad`, added to what is there unless it is the `first`;
//   `flipped` is `w` turned by 180 degrees. With stride 1 it asks `ahead` for as many pixels as dx has.
// add_depthwise_weights: out [C / V][K * K][V] = or, unless it begins, += sum over pixels of grad * shifted src. Sums
//   run over at most `rows` rows before they join the total: short chains keep float accurate.
#pragma once

#include "scratch.h"

#define PDARTS_DECLARE_CHUNK(E)                                                                             \
  void depthwise_chunk(const Branch& b, const PlaneData& src, const float* w, int64_t channels,             \
                       int64_t begin, int64_t end, int64_t width, const AheadsData& ahead, E* a);

#define PDARTS_DECLARE_STENCILS                                                                             \
  PDARTS_DECLARE_CHUNK(float)                                                                               \
  void add_transposed(const Branch& b, const PlaneData& grad, const float* w, const float* flipped,         \
                      int64_t blocks, const PlaneData& dx, bool first, const AheadsData& ahead);            \
  void add_depthwise_weights(const Branch& b, const PlaneData& grad, const PlaneData& src, int64_t blocks,  \
                             int64_t rows, float* out, bool begins);

namespace pdarts {

#ifdef PDARTS_BF16
namespace avx512 {
PDARTS_DECLARE_STENCILS
}  // namespace avx512

namespace avx512bf16 {
PDARTS_DECLARE_CHUNK(BFloat)
}  // namespace avx512bf16

namespace PDARTS_VARIANT {
using avx512::add_depthwise_weights;
using avx512::add_transposed;
using avx512::depthwise_chunk;
#ifdef PDARTS_AMX
using avx512bf16::depthwise_chunk;
#endif
}  // namespace PDARTS_VARIANT
#else
namespace PDARTS_VARIANT {
PDARTS_DECLARE_STENCILS
}  // namespace PDARTS_VARIANT
#endif

namespace PDARTS_VARIANT {

// [C, K, K] -> [C / V][K * K][V]; `flip` turns the kernel by 180 degrees.
PDARTS_INLINE void pack_depthwise(const float* w, int64_t channels, int64_t taps, bool flip,
                                  float* packed) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t)
      packed[(c / V * taps + t) * V + c % V] = w[c * taps + (flip ? taps - 1 - t : t)];
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
