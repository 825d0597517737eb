// reduce: what a node's gradient g says about the weights of its operations, over the batch.
//   sums[c] of the task = sum of g
//   sums[c] of a branch = sum of g * (y * scale + shift), or of g * dropout(x) for a skip
// With scale and shift of the normalisation these give the gradient of the alpha and both batch
// means of the BatchNorm backward.
#include "dropout.h"
#include "operand.h"
#include "parallel.h"
#include "primitives.h"
#include "statistics.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch shared_scratch, entrants_scratch, local_scratch;

// Floats of the gradient that are used for all branches while they are in cache.
constexpr int64_t kRun = 4096;

// Sums that a branch that is read as it is alternates between.
constexpr int kChains = 2;

// total[i] += sum of chains[.][i].
template <int N>
PDARTS_INLINE void add_chains(const Vec (&chains)[N], double* total) {
  Vec sum = chains[0];
  PDARTS_UNROLL
  for (int i = 1; i < N; ++i) sum += chains[i];
  float chunk[V];
  store(chunk, sum);
  add_sums(total, chunk, V);
}

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
    add_chains(sum, total + c);
  }
}

// Where the sums of a branch lie in those of a task.
PDARTS_INLINE double* place_of(const Task& t, const Branch* b, double* total) {
  return total + (b - t.branches + 1) * t.channels;
}

// Pools, rows [begin, end) of image n; `g` is the gradient from there on, `total` [branches + 1, C].
template <bool kMost, bool kMean, class T>
PDARTS_SHARED void pool_sums(const Task& t, const Pools& pools, const T* g, int64_t n,
                             int64_t begin, int64_t end, double* total) {
  const Branch& any = pools.any();
  const Task pool = pool_task(t, any);
  const T* image = entering<T>(t, any, n, 0).data;
  for (int64_t c = 0; c < t.channels; c += V) {
    Vec most_sum[kWindows] = {}, mean_sum[kWindows] = {};
    const auto normalised = [&](const Branch* b, Vec y) PDARTS_LAMBDA {
      return y * load(b->scale + c) + load(b->shift + c);
    };
    pool_rows(pool, any.stride, image, begin, end, c, [&](int64_t p, int chain, Vec most, Vec mean)
                                                          PDARTS_LAMBDA {
      ask_below(pool, any.stride, image, begin, p, c);
      const Vec grad = load(g + p * t.x_stride + c);
      if (kMost) most_sum[chain] += grad * normalised(pools.most, most);
      if (kMean) mean_sum[chain] += grad * normalised(pools.mean, as_stored<T>(mean));
    });
    if (kMost) add_chains(most_sum, place_of(t, pools.most, total) + c);
    if (kMean) add_chains(mean_sum, place_of(t, pools.mean, total) + c);
  }
}

// N branches that are read as they are; arguments as for a pool.
template <int N, class T>
PDARTS_SHARED void plain_sums(const Task& t, const Branch* const* branches, const T* g, int64_t n,
                              int64_t begin, int64_t end, float* room, double* total) {
  const int64_t pixels = (end - begin) * t.out_width;
  Entering<T> from[N];
  for (int i = 0; i < N; ++i) from[i] = entering<T>(t, *branches[i], n, begin);
  const int64_t channels = t.channels, blocks = channels / V;
  for (int64_t i = 0; i < blocks * N * kChains; ++i) store(room + i * V, Vec{});
  in_windows(pixels, channels, [&](int64_t first, int64_t last, int64_t c) PDARTS_LAMBDA {
    float* sums = room + c * N * kChains;
    Vec scale[N], shift[N], sum[N][kChains];
    PDARTS_UNROLL
    for (int i = 0; i < N; ++i) {
      const bool skip = branches[i]->kind == kSkip;
      scale[i] = skip ? broadcast(1.0f) : load(branches[i]->scale + c);
      shift[i] = skip ? Vec{} : load(branches[i]->shift + c);
      PDARTS_UNROLL
      for (int k = 0; k < kChains; ++k) sum[i][k] = load(sums + (i * kChains + k) * V);
    }
    const auto add = [&](int64_t j, int chain) PDARTS_LAMBDA {
      const int64_t p = first + j;
      const Vec grad = load(g + p * t.x_stride + c);
      PDARTS_UNROLL
      for (int i = 0; i < N; ++i) {
        from[i].ask_ahead(p, c);
        const Vec y = load(from[i].data + p * from[i].stride + c);
        sum[i][chain] += grad * (y * scale[i] + shift[i]);
      }
    };
    in_chains<kChains>(last - first, add);
    PDARTS_UNROLL
    for (int i = 0; i < N; ++i) {
      PDARTS_UNROLL
      for (int k = 0; k < kChains; ++k) store(sums + (i * kChains + k) * V, sum[i][k]);
    }
  });
  for (int64_t c = 0; c < channels; c += V)
    for (int i = 0; i < N; ++i) {
      Vec sum[kChains];
      PDARTS_UNROLL
      for (int k = 0; k < kChains; ++k) sum[k] = load(room + c * N * kChains + (i * kChains + k) * V);
      add_chains(sum, place_of(t, branches[i], total) + c);
    }
}

// A skip with dropout.
template <class T>
PDARTS_SHARED void dropped_sums(const Task& t, const Branch& b, const T* g, int64_t n,
                                int64_t begin, int64_t end, float* factors, double* total) {
  const Entering<T> from = entering<T>(t, b, n, begin);
  const int64_t pixels = (end - begin) * t.out_width, real = t.real_channels;
  const int64_t first = (n * t.out_height + begin) * t.out_width;
  const auto add = [&](auto factor) PDARTS_LAMBDA {
    add_sum(pixels, t.channels, total, [&](int64_t p, int64_t c) PDARTS_LAMBDA {
      from.ask_ahead(p, c);
      return load(g + p * t.x_stride + c) * factor(p, c) * load(from.data + p * from.stride + c);
    });
  };
  if (b.mask) {
    const uint8_t* keep = b.mask + first * t.channels;
    add([&](int64_t p, int64_t c) PDARTS_LAMBDA { return load_mask(keep + p * t.channels + c); });
  } else if (b.kept) {
    const Vec kept = kept_factor(t);
    add([&](int64_t p, int64_t c) PDARTS_LAMBDA {
      return load_kept(b.kept, (first + p) * t.channels + c, kept);
    });
  } else {
    const float* keep = dropout_factors(t, b, first * real, pixels * real, factors);
    add([&](int64_t p, int64_t c) PDARTS_LAMBDA { return load(keep + p * real + c); });
  }
}

// total [branches + 1, C] += sums of rows [begin, end) of image n.
template <class T>
void run_sums(const Task& t, const Entrants& all, int64_t n, int64_t begin, int64_t end,
              float* factors, float* chains, double* total) {
  const T* g =
      static_cast<const T*>(t.x) + (n * t.out_height + begin) * t.out_width * t.x_stride;
  const Entering<T> gradient{g, t.x_stride};
  add_sum((end - begin) * t.out_width, t.channels, total, [&](int64_t p, int64_t c) PDARTS_LAMBDA {
    gradient.ask_ahead(p, c);
    return load(g + p * t.x_stride + c);
  });
  for (const Pools& pools : all.pools)
    with_pools(pools, [&](auto most, auto mean) {
      pool_sums<most.value, mean.value>(t, pools, g, n, begin, end, total);
    });
  for (const Branch* b : all.dropped)
    dropped_sums(t, *b, g, n, begin, end, factors, place_of(t, b, total));
  together(all, [&](const Branch* const* some, auto count) {
    plain_sums<count.value>(t, some, g, n, begin, end, chains, total);
  });
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
  const Entrants all(t, entrants_scratch);
  parallel(t.threads, [&](Member& member) {
    Scratch& local = local_scratch;
    const int64_t factor_floats = dropout_floats(step * channels) + channels + V;
    const int64_t chain_floats = kTogether * kChains * channels;
    local.reset(Scratch::bytes_for<float>(factor_floats) + Scratch::bytes_for<float>(chain_floats));
    float* factors = local.take<float>(factor_floats);
    float* chains = local.take<float>(chain_floats);
    std::memset(factors, 0, static_cast<size_t>(factor_floats) * sizeof(float));
    each(member, t.groups, 1, [&](int64_t group) {
      const Range range = group_range(t, group);
      double* total = partial + group * columns;
      for (int64_t n = range.begin; n < range.end; ++n)
        for (int64_t begin = 0; begin < t.out_height; begin += rows)
          run_sums<T>(t, all, n, begin, min_of(begin + rows, t.out_height), factors, chains, total);
    });
  });
  for (int64_t i = 0; i <= t.num_branches; ++i)
    sum_groups(partial + i * channels, t.groups, columns, channels, i ? t.branches[i - 1].sums : t.sums);
}

}  // namespace

void reduce(const Task& t) {
  t.bf16 ? run<BFloat>(t) : PDARTS_FLOAT(reduce, run<float>(t));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
