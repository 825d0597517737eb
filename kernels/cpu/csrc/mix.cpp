// mix: a node, the weighted sum of all operations of all edges into it.
//   out = shift + sum over branches of scale * y, or scale * dropout(x) for a skip
// affine: out = x * scale + shift, in place, for the cell's normalised inputs.
#include "dropout.h"
#include "operand.h"
#include "primitives.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch local_scratch;

// Pixels that are summed together: a run of every operand long enough for the prefetcher, a sum
// that stays in the first-level cache.
constexpr int64_t kRun = 4096;

// total [pixels, C] += branch, for pixels first .. first + pixels - 1 of the batch. `ahead` is what
// is read next.
template <class T>
void add_branch(const Task& t, const Branch& b, int64_t first, int64_t pixels, const Ahead& ahead,
                float* factors, float* total) {
  const int64_t channels = t.channels, stride = operand_stride(t, b);
  const T* x = operand<T>(b) + first * stride;
  if (b.mask) {
    const uint8_t* keep = b.mask + first * channels;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; c += V) {
        float* o = total + p * channels + c;
        ahead.ask(p, c / V);
        const Vec kept = load_mask(keep + p * channels + c) * load(x + p * stride + c);
        store(o, load(o) + load(b.scale + c) * kept);
      }
    return;
  }
  if (b.kind == kSkip && b.stream >= 0) {
    const int64_t real = t.real_channels;
    const float* keep = dropout_factors(t, b, first * real, pixels * real, factors);
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; c += V) {
        float* o = total + p * channels + c;
        ahead.ask(p, c / V);
        store(o, load(o) + load(b.scale + c) * load(keep + p * real + c) * load(x + p * stride + c));
      }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += V) {
      float* o = total + p * channels + c;
      ahead.ask(p, c / V);
      store(o, load(o) + load(b.scale + c) * load(x + p * stride + c));
    }
}

template <class T>
void run_mix(const Task& t) {
  const int64_t channels = t.channels, all = t.images * t.out_height * t.out_width;
  const int64_t run = kRun / channels < 1 ? 1 : kRun / channels;
  const int64_t runs = (all + run - 1) / run;
#pragma omp parallel num_threads(static_cast<int>(t.threads))
  {
    Scratch& local = local_scratch;
    const int64_t factor_floats = dropout_floats(run * channels) + channels + V;
    local.reset(Scratch::bytes_for<float>(run * channels) + Scratch::bytes_for<float>(factor_floats));
    float* total = local.take<float>(run * channels);
    float* factors = local.take<float>(factor_floats);
    std::memset(factors, 0, static_cast<size_t>(factor_floats) * sizeof(float));
#pragma omp for schedule(dynamic, 8)
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t first = r * run, pixels = min_of(run, all - first);
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; c += V) store(total + p * channels + c, load(t.shift + c));
      for (int64_t i = 0; i < t.num_branches; ++i)
        add_branch<T>(t, t.branches[i], first, pixels, operand_ahead<T>(t, i, first, pixels), factors,
                      total);
      T* out = static_cast<T*>(t.out) + first * t.out_stride;
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; c += V)
          store(out + p * t.out_stride + c, load(total + p * channels + c));
    }
  }
}

template <class T>
void run_affine(const Task& t) {
  const int64_t channels = t.channels, all = t.images * t.out_height * t.out_width;
  const float* scale = t.branches[0].scale;
  const float* shift = t.branches[0].shift;
  T* y = static_cast<T*>(t.out);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(t.threads))
  for (int64_t p = 0; p < all; ++p)
    for (int64_t c = 0; c < channels; c += V) {
      T* o = y + p * channels + c;
      store(o, load(o) * load(scale + c) + load(shift + c));
    }
}

}  // namespace

void mix(const Task& t) {
  t.bf16 ? run_mix<BFloat>(t) : PDARTS_FLOAT(mix, run_mix<float>(t));
}

void affine(const Task& t) {
  t.bf16 ? run_affine<BFloat>(t) : PDARTS_FLOAT(affine, run_affine<float>(t));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
