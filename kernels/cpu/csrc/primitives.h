// The primitives of one variant; each .cpp says what its primitives compute.
#pragma once

#include "simd.h"

namespace pdarts {
namespace PDARTS_VARIANT {

void fan_out(const Task&);
void mid(const Task&);
void affine(const Task&);
void mix(const Task&);
void reduce(const Task&);
void mid_backward(const Task&);
void fan_in(const Task&);

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
