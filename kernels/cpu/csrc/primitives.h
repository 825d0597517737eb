// The primitives of one variant; each .cpp says what its primitives compute.
#pragma once

#include "simd.h"

// What a variant with bfloat16 products does for float32: that of the variant it extends, `avx512`.
#ifdef PDARTS_BF16
#define PDARTS_FLOAT(primitive, call) avx512::primitive(t)
#else
#define PDARTS_FLOAT(primitive, call) call
#endif

#define PDARTS_DECLARE_PRIMITIVES  \
  void fan_out(const Task&);       \
  void mid(const Task&);           \
  void affine(const Task&);        \
  void mix(const Task&);           \
  void reduce(const Task&);        \
  void mid_backward(const Task&);  \
  void fan_in(const Task&);        \
  void draw(const DrawTask&);

namespace pdarts {

#ifdef PDARTS_BF16
namespace avx512 {
PDARTS_DECLARE_PRIMITIVES
}  // namespace avx512
#endif

#ifdef PDARTS_AMX
namespace avx512bf16 {
PDARTS_DECLARE_PRIMITIVES
}  // namespace avx512bf16
#endif

namespace PDARTS_VARIANT {
PDARTS_DECLARE_PRIMITIVES
}  // namespace PDARTS_VARIANT

}  // namespace pdarts
