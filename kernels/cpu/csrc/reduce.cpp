// reduce: what a node's gradient g says about the weights of its operations, over the batch.
//   sums[c] of the task = sum of g
//   sums[c] of a branch = sum of g * (y * scale + shift), or of g * dropout(x) for a skip
// With scale and shift of the normalisation these give the gradient of the alpha and both batch
// means of the BatchNorm backward.
#include "dropout.h"
#include "operand.h"
#include "primitives.h"
#include "statistics.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch shared_scratch, local_scratch;

// Floats of the gradient that are used for all branches while they are in cache.
constexpr int64_t kRun = 4096;

// total [C] += sum of f(pixel, channel), through four float chains of a quarter run each.
template <class F>
PDARTS_INLINE void add_sum(int64_t pixels, int64_t channels, double* total, F f) {
  for (int64_t c = 0; c < channels; c += V) {
    Vec sum[4] = {};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
      PDARTS_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] += f(p + i, c);
    }
    for (; p < pixels; ++p) sum[0] += f(p, c);
    float chunk[V];
    store(chunk, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    add_sums(total + c, chunk, V);
  }
}

// A pool that is stored nowhere, rows [begin, end) of what `image` gives.
template <class T>
PDARTS_SHARED void pool_sums(const Task& t, const Branch& b, const T* g, const T* image,
                             int64_t begin, int64_t end, const Ahead& ahead, double* total) {
  const Task pool = pool_task(t, b);
  for (int64_t c = 0; c < t.channels; c += V) {
    const Vec scale = load(b.scale + c), shift = load(b.shift + c);
    Vec sum[kWindows] = {};
    pool_rows(pool, b, image, begin, end, c, [&](int64_t p, int chain, Vec v) PDARTS_LAMBDA {
      ahead.ask(p, c / V);
      sum[chain] += load(g + p * t.x_stride + c) * (as_stored<T>(v) * scale + shift);
    });
    float chunk[V];
    store(chunk, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    add_sums(total + c, chunk, V);
  }
}

// Rows [begin, end) of image n; `ahead` is what is read next.
template <class T>
void branch_sums(const Task& t, const Branch& b, const T* g, int64_t n, int64_t begin, int64_t end,
                 const Ahead& ahead, float* factors, double* total) {
  if (is_recomputed(b)) {
    pool_sums(t, b, g, entering<T>(t, b, n, 0).data, begin, end, ahead, total);
    return;
  }
  const Entering<T> from = entering<T>(t, b, n, begin);
  const int64_t gs = t.x_stride, pixels = (end - begin) * t.out_width;
  const int64_t first = (n * t.out_height + begin) * t.out_width;
  if (b.kind != kSkip) {
    const T* y = from.data;
    add_sum(pixels, t.channels, total, [&](int64_t p, int64_t c) {
      ahead.ask(p, c / V);
      return load(g + p * gs + c) *
             (load(y + p * t.channels + c) * load(b.scale + c) + load(b.shift + c));
    });
    return;
  }
  const T* x = from.data;
  if (b.mask) {
    const uint8_t* keep = b.mask + first * t.channels;
    add_sum(pixels, t.channels, total, [&](int64_t p, int64_t c) {
      ahead.ask(p, c / V);
      return load(g + p * gs + c) * load_mask(keep + p * t.channels + c) *
             load(x + p * b.input_stride + c);
    });
    return;
  }
  if (b.kept) {
    const Vec kept = kept_factor(t);
    add_sum(pixels, t.channels, total, [&](int64_t p, int64_t c) {
      ahead.ask(p, c / V);
      return load(g + p * gs + c) * load_kept(b.kept, (first + p) * t.channels + c, kept) *
             load(x + p * b.input_stride + c);
    });
    return;
  }
  if (b.stream < 0) {
    add_sum(pixels, t.channels, total, [&](int64_t p, int64_t c) {
      ahead.ask(p, c / V);
      return load(g + p * gs + c) * load(x + p * b.input_stride + c);
    });
    return;
  }
  const int64_t real = t.real_channels;
  const float* keep = dropout_factors(t, b, first * real, pixels * real, factors);
  add_sum(pixels, t.channels, total, [&](int64_t p, int64_t c) {
    ahead.ask(p, c / V);
    return load(g + p * gs + c) * load(keep + p * real + c) * load(x + p * b.input_stride + c);
  });
}

// total [branches + 1, C] += sums of rows [begin, end) of image n.
template <class T>
void run_sums(const Task& t, int64_t n, int64_t begin, int64_t end, float* factors,
              double* total) {
  const int64_t pixels = (end - begin) * t.out_width;
  const T* g =
      static_cast<const T*>(t.x) + (n * t.out_height + begin) * t.out_width * t.x_stride;
  add_sum(pixels, t.channels, total,
          [&](int64_t p, int64_t c) { return load(g + p * t.x_stride + c); });
  for (int64_t i = 0; i < t.num_branches; ++i)
    branch_sums(t, t.branches[i], g, n, begin, end, entering_ahead<T>(t, i, n, begin, end),
                factors, total + (i + 1) * t.channels);
}

template <class T>
void run(const Task& t) {
  const int64_t channels = t.channels;
  const int64_t columns = (t.num_branches + 1) * channels;
  const int64_t rows = rows_per_run(t, kRun), step = rows * t.out_width;
  Scratch& shared = shared_scratch;
  shared.reset(Scratch::bytes_for<double>(t.groups * columns));
  double* partial = shared.take<double>(t.groups * columns);
  std::memset(partial, 0, static_cast<size_t>(t.groups * columns) * sizeof(double));
#pragma omp parallel num_threads(static_cast<int>(t.threads))
  {
    Scratch& local = local_scratch;
    const int64_t factor_floats = dropout_floats(step * channels) + channels + V;
    local.reset(Scratch::bytes_for<float>(factor_floats));
    float* factors = local.take<float>(factor_floats);
    std::memset(factors, 0, static_cast<size_t>(factor_floats) * sizeof(float));
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < t.groups; ++group) {
      const Range range = group_range(t, group);
      double* total = partial + group * columns;
      for (int64_t n = range.begin; n < range.end; ++n)
        for (int64_t begin = 0; begin < t.out_height; begin += rows)
          run_sums<T>(t, n, begin, min_of(begin + rows, t.out_height), factors, total);
    }
  }
  for (int64_t i = 0; i <= t.num_branches; ++i) {
    double* out = i == 0 ? t.sums : t.branches[i - 1].sums;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0;
      for (int64_t g = 0; g < t.groups; ++g) sum += partial[g * columns + i * channels + c];
      out[c] = sum;
    }
  }
}

}  // namespace

void reduce(const Task& t) {
  t.bf16 ? run<BFloat>(t) : PDARTS_FLOAT(reduce, run<float>(t));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
