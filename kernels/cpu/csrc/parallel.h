// Jobs and loops of a team's threads, for code of a variant.
#pragma once

#include "simd.h"
#include "team.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// f(member) on every thread, once.
template <class F>
PDARTS_INLINE void parallel(int64_t threads, F f) {
  run_job(threads, [](void* data, Member& member) { (*static_cast<F*>(data))(member); }, &f);
}

// f(i) for i < count: threads take `size` of them at a time. Does not wait for the others.
template <class F>
PDARTS_INLINE void each(Member& member, int64_t count, int64_t size, F f) {
  for (int64_t begin = member.claim() * size; begin < count; begin = member.claim() * size)
    for (int64_t i = begin; i < begin + size && i < count; ++i) f(i);
  member.end_loop();
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
