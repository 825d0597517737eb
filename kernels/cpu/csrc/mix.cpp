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

// Numbers of rows that are summed together: a run of every operand long enough for the prefetcher, a
// sum that stays in the first-level cache.
constexpr int64_t kRun = 4096;

// total [pixels, C] += a pool that is stored nowhere, rows [begin, end) of what `image` gives. `ahead`
// is what is read next.
template <class T>
PDARTS_SHARED void add_pool(const Task& t, const Branch& b, const T* image, int64_t begin,
                            int64_t end, const Ahead& ahead, float* total) {
  const Task pool = pool_task(t, b);
  for (int64_t c = 0; c < t.channels; c += V) {
    const Vec scale = load(b.scale + c);
    pool_rows(pool, b, image, begin, end, c, [&](int64_t p, int, Vec v) PDARTS_LAMBDA {
      float* o = total + p * t.channels + c;
      ahead.ask(p, c / V);
      store(o, load(o) + scale * as_stored<T>(v));
    });
  }
}

// total [pixels, C] += branch, for rows [begin, end) of image n. `ahead` is what is read next.
template <class T>
void add_branch(const Task& t, const Branch& b, int64_t n, int64_t begin, int64_t end,
                const Ahead& ahead, float* factors, float* total) {
  const int64_t channels = t.channels, pixels = (end - begin) * t.out_width;
  const int64_t first = (n * t.out_height + begin) * t.out_width;
  if (is_recomputed(b)) {
    add_pool(t, b, entering<T>(t, b, n, 0).data, begin, end, ahead, total);
    return;
  }
  const Entering<T> from = entering<T>(t, b, n, begin);
  const int64_t stride = from.stride;
  const T* x = from.data;
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
    uint8_t* bits = b.kept ? b.kept + first * channels / 8 : nullptr;
    const float* keep = dropout_factors(t, b, first * real, pixels * real, factors, bits);
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
  const int64_t channels = t.channels, width = t.out_width;
  const int64_t rows = rows_per_run(t, kRun), run = rows * width;
  const int64_t runs = (t.out_height + rows - 1) / rows;
#pragma omp parallel num_threads(static_cast<int>(t.threads))
  {
    Scratch& local = local_scratch;
    const int64_t factor_floats = dropout_floats(run * channels) + channels + V;
    local.reset(Scratch::bytes_for<float>(run * channels) + Scratch::bytes_for<float>(factor_floats));
    float* total = local.take<float>(run * channels);
    float* factors = local.take<float>(factor_floats);
    std::memset(factors, 0, static_cast<size_t>(factor_floats) * sizeof(float));
#pragma omp for schedule(dynamic, 8)
    for (int64_t r = 0; r < t.images * runs; ++r) {
      const int64_t n = r / runs, begin = r % runs * rows, end = min_of(begin + rows, t.out_height);
      const int64_t first = (n * t.out_height + begin) * width, pixels = (end - begin) * width;
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; c += V) store(total + p * channels + c, load(t.shift + c));
      for (int64_t i = 0; i < t.num_branches; ++i)
        add_branch<T>(t, t.branches[i], n, begin, end, entering_ahead<T>(t, i, n, begin, end),
                      factors, total);
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
