// mix: a node, the weighted sum of all operations of all edges into it.
//   out = shift + sum over branches of scale * y, or scale * dropout(x) for a skip
// affine: out = x * scale + shift, in place, for the cell's normalised inputs.
#include "dropout.h"
#include "lines.h"
#include "operand.h"
#include "parallel.h"
#include "primitives.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch shared_scratch, local_scratch;

// Numbers of rows that are summed together: a run of every operand long enough for the prefetcher, a
// sum that stays in the first-level cache.
constexpr int64_t kRun = 4096;

// total [pixels, C] += pools, rows [begin, end) of image n.
template <bool kMost, bool kMean, class T>
PDARTS_SHARED void add_pools(const Task& t, const Pools& pools, int64_t n, int64_t begin,
                             int64_t end, float* total) {
  const Branch& any = pools.any();
  const Task pool = pool_task(t, any);
  const T* image = entering<T>(t, any, n, 0).data;
  for (int64_t c = 0; c < t.channels; c += V) {
    const Vec of_most = kMost ? load(pools.most->scale + c) : Vec{};
    const Vec of_mean = kMean ? load(pools.mean->scale + c) : Vec{};
    pool_rows(pool, any.stride, image, begin, end, c, [&](int64_t p, int, Vec most, Vec mean)
                                                          PDARTS_LAMBDA {
      ask_below(pool, any.stride, image, begin, p, c);
      float* o = total + p * t.channels + c;
      Vec sum = load(o);
      if (kMost) sum += of_most * most;
      if (kMean) sum += of_mean * as_stored<T>(mean);
      store(o, sum);
    });
  }
}

// total [pixels, C] += N branches, rows [begin, end) of image n, times factor(pixel, channel).
template <int N, class T, class Factor>
PDARTS_INLINE void add_branches(const Task& t, const Branch* const* branches, int64_t n,
                                int64_t begin, int64_t end, float* total, Factor factor) {
  const int64_t channels = t.channels, pixels = (end - begin) * t.out_width;
  Entering<T> from[N];
  for (int i = 0; i < N; ++i) from[i] = entering<T>(t, *branches[i], n, begin);
  in_windows(pixels, channels, [&](int64_t first, int64_t last, int64_t c) PDARTS_LAMBDA {
    Vec scale[N];
    PDARTS_UNROLL
    for (int i = 0; i < N; ++i) scale[i] = load(branches[i]->scale + c);
    for (int64_t p = first; p < last; ++p) {
      float* o = total + p * channels + c;
      Vec sum = load(o);
      PDARTS_UNROLL
      for (int i = 0; i < N; ++i) {
        from[i].ask_ahead(p, c);
        sum += scale[i] * factor(p, c, load(from[i].data + p * from[i].stride + c));
      }
      store(o, sum);
    }
  });
}

// total [pixels, C] += a skip with dropout, rows [begin, end) of image n.
template <class T>
PDARTS_SHARED void add_dropped(const Task& t, const Branch* b, int64_t n, int64_t begin,
                               int64_t end, float* factors, float* total) {
  const int64_t channels = t.channels, real = t.real_channels;
  const int64_t first = (n * t.out_height + begin) * t.out_width;
  if (b->mask) {
    const uint8_t* keep = b->mask + first * channels;
    add_branches<1, T>(t, &b, n, begin, end, total,
                       [&](int64_t p, int64_t c, Vec x) PDARTS_LAMBDA {
                         return load_mask(keep + p * channels + c) * x;
                       });
    return;
  }
  const int64_t count = (end - begin) * t.out_width * real;
  if (b->kept) {
    uint8_t* bits = b->kept + first * channels / 8;
    dropout_bits(t, *b, first * real, count, bits);
    const Vec kept = kept_factor(t);
    add_branches<1, T>(t, &b, n, begin, end, total, [&](int64_t p, int64_t c, Vec x) PDARTS_LAMBDA {
      return load_kept(bits, p * channels + c, kept) * x;
    });
    return;
  }
  const float* keep = dropout_factors(t, *b, first * real, count, factors);
  add_branches<1, T>(t, &b, n, begin, end, total, [&](int64_t p, int64_t c, Vec x) PDARTS_LAMBDA {
    return load(keep + p * real + c) * x;
  });
}

template <int N, class T>
PDARTS_SHARED void add_plain(const Task& t, const Branch* const* branches, int64_t n,
                             int64_t begin, int64_t end, float* total) {
  add_branches<N, T>(t, branches, n, begin, end, total,
                     [](int64_t, int64_t, Vec x) PDARTS_LAMBDA { return x; });
}

template <class T>
void run_mix(const Task& t) {
  const int64_t channels = t.channels, width = t.out_width;
  const int64_t rows = rows_per_run(t, kRun), run = rows * width;
  const int64_t runs = (t.out_height + rows - 1) / rows;
  // Other nodes of the output may lie between two pixels of this one.
  const bool whole_lines =
      t.out_stride == channels || channels * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  const Entrants all(t, shared_scratch);
  parallel(t.threads, [&](Member& member) {
    Scratch& local = local_scratch;
    const int64_t factor_floats = dropout_floats(run * channels) + channels + V;
    local.reset(Scratch::bytes_for<float>(run * channels) + Scratch::bytes_for<float>(factor_floats));
    float* total = local.take<float>(run * channels);
    float* factors = local.take<float>(factor_floats);
    std::memset(factors, 0, static_cast<size_t>(factor_floats) * sizeof(float));
    each(member, t.images * runs, 8, [&](int64_t r) {
      const int64_t n = r / runs, begin = r % runs * rows, end = min_of(begin + rows, t.out_height);
      const int64_t first = (n * t.out_height + begin) * width, pixels = (end - begin) * width;
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; c += V) store(total + p * channels + c, load(t.shift + c));
      for (const Branch* b : all.dropped) add_dropped<T>(t, b, n, begin, end, factors, total);
      for (const Pools& pools : all.pools)
        with_pools(pools, [&](auto most, auto mean) {
          add_pools<most.value, mean.value, T>(t, pools, n, begin, end, total);
        });
      together(all, [&](const Branch* const* some, auto count) {
        add_plain<count.value, T>(t, some, n, begin, end, total);
      });
      T* out = static_cast<T*>(t.out) + first * t.out_stride;
      write_rows(pixels, channels, out, t.out_stride, whole_lines,
                 [&](int64_t p, int64_t c) PDARTS_LAMBDA { return load(total + p * channels + c); });
    });
    end_streams();
  });
}

template <class T>
void run_affine(const Task& t) {
  const int64_t channels = t.channels, all = t.images * t.out_height * t.out_width;
  const float* scale = t.branches[0].scale;
  const float* shift = t.branches[0].shift;
  T* y = static_cast<T*>(t.out);
  parallel(t.threads, [&](Member& member) {
    each(member, all, kRun / channels + 1, [&](int64_t p) {
      for (int64_t c = 0; c < channels; c += V) {
        T* o = y + p * channels + c;
        store(o, load(o) * load(scale + c) + load(shift + c));
      }
    });
  });
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
