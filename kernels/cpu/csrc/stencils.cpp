// What stencils.h declares: depthwise.h for every kernel.
#include "stencils.h"

#include "depthwise.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

// Calls f(Int<K>, Int<dilation>, Int<stride>).
template <class F>
PDARTS_INLINE void with_kernel(const Branch& b, F f) {
  const auto with_stride = [&](auto k, auto d) PDARTS_LAMBDA {
    b.stride == 1 ? f(k, d, Int<1>{}) : f(k, d, Int<2>{});
  };
  const auto with_dilation = [&](auto k) PDARTS_LAMBDA {
    b.dilation == 1 ? with_stride(k, Int<1>{}) : with_stride(k, Int<2>{});
  };
  b.kernel == 3 ? with_dilation(Int<3>{}) : with_dilation(Int<5>{});
}

// depthwise_chunk for one type of its output.
template <class E>
PDARTS_INLINE void chunk(const Branch& b, const Plane& src, const float* w, int64_t channels, int64_t begin,
                         int64_t end, int64_t width, const Aheads& ahead, E* a) {
  const ChunkOutputs<E> out{a, channels, width * channels};
  with_kernel(b, [&](auto k, auto d, auto s) {
    depthwise_rows<k.value, d.value, s.value>(src, b.padding, w, channels / V, begin, end, width, ahead, out);
  });
}

}  // namespace

#ifdef PDARTS_BF16
void depthwise_chunk(const Branch& b, const PlaneData& src, const float* w, int64_t channels, int64_t begin,
                     int64_t end, int64_t width, const AheadsData& ahead, BFloat* a) {
  chunk(b, {src}, w, channels, begin, end, width, {ahead}, a);
}
#else
void depthwise_chunk(const Branch& b, const PlaneData& src, const float* w, int64_t channels, int64_t begin,
                     int64_t end, int64_t width, const AheadsData& ahead, float* a) {
  chunk(b, {src}, w, channels, begin, end, width, {ahead}, a);
}

void add_transposed(const Branch& b, const PlaneData& grad, const float* w, const float* flipped,
                    int64_t blocks, const PlaneData& dx, bool first, const AheadsData& ahead) {
  const Plane from{grad}, to{dx};
  with_kernel(b, [&](auto k, auto d, auto s) {
    if constexpr (s.value == 1)
      depthwise_rows<k.value, d.value, 1>(
          from, b.padding, flipped, blocks, 0, to.height, to.width, {ahead},
          PlaneOutputs{to.at(0, 0, 0), to.stride, to.plane, !first});
    else
      depthwise_transposed_2<k.value, d.value>(from, w, b.padding, blocks, to);
  });
}

void add_depthwise_weights(const Branch& b, const PlaneData& grad, const PlaneData& src, int64_t blocks,
                           int64_t rows, float* out, bool begins) {
  with_kernel(b, [&](auto k, auto d, auto s) {
    depthwise_weights<k.value, d.value, s.value>({grad}, {src}, b.padding, blocks, rows, out, begins);
  });
}
#endif

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
