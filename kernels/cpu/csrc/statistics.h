// Channel statistics: within a chunk in float, everything longer in double and in a fixed order.
#pragma once

#include "lines.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// Mean and sum of squared deviations of some pixels, [C] each (Chan et al. 1979). Deviations are
// from the chunk's own mean: raw sums of squares lose digits where the mean is large.
struct Moments {
  double count;
  double* mean;
  double* squares;
};

PDARTS_INLINE void merge(Moments& into, double count, const double* mean, const double* squares,
                         int64_t channels) {
  const double total = into.count + count;
  const double part = count / total, cross = into.count * part;
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = mean[c] - into.mean[c];
    into.mean[c] += delta * part;
    into.squares[c] += squares[c] + delta * delta * cross;
  }
  into.count = total;
}

// Adds those of `count` pixels to channels [c, c + V), which have those of `before` pixels.
PDARTS_INLINE void add_moments(Moments& into, double before, double count, int64_t c, Vec mean,
                               Vec squares) {
  double mean_d[V], squares_d[V];
  for (int i = 0; i < V; ++i) {
    mean_d[i] = static_cast<double>(mean[i]);
    squares_d[i] = static_cast<double>(squares[i]);
  }
  Moments part{before, into.mean + c, into.squares + c};
  merge(part, count, mean_d, squares_d, V);
}

// Adds the pixels of a chunk y [pixels, channels].
template <class T>
PDARTS_INLINE void add_chunk(Moments& into, const T* y, int64_t pixels, int64_t channels) {
  const float inverse = 1.0f / static_cast<float>(pixels);
  for (int64_t c = 0; c < channels; c += V) {
    Vec sum[4] = {};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
      PDARTS_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] += load(y + (p + i) * channels + c);
    }
    for (; p < pixels; ++p) sum[0] += load(y + p * channels + c);
    const Vec mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * inverse;
    Vec square[4] = {};
    for (p = 0; p + 4 <= pixels; p += 4) {
      PDARTS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Vec d = load(y + (p + i) * channels + c) - mean;
        square[i] += d * d;
      }
    }
    for (; p < pixels; ++p) {
      const Vec d = load(y + p * channels + c) - mean;
      square[0] += d * d;
    }
    const Vec squares = (square[0] + square[1]) + (square[2] + square[3]);
    add_moments(into, into.count, static_cast<double>(pixels), c, mean, squares);
  }
  into.count += static_cast<double>(pixels);
}

// Rounds a chunk [pixels, channels], adds what is stored to the moments and writes it to y unless that is
// null.
template <class T>
PDARTS_INLINE void finish_chunk(Moments& into, T* chunk, int64_t pixels, int64_t channels, T* y) {
  add_chunk(into, chunk, pixels, channels);
  if (y) write_out(y, chunk, pixels * channels);
}

#ifdef PDARTS_BF16
// As above. Deviations are from the first pixel: their mean's square, which is subtracted, is at most
// `pixels` times the variance, and is about as large on average.
PDARTS_SHARED void finish_chunk(Moments& into, const float* chunk, int64_t pixels, int64_t channels,
                                BFloat* y) {
  const bool past = y && can_stream_lines(y, channels);
  double before = into.count;
  each_line(pixels, channels, [&](const Lines& lines, auto vectors) PDARTS_LAMBDA {
    constexpr int N = vectors.value;
    if (!lines.count) return;
    Vec pivot[N], sum[kLineChains][N] = {}, square[kLineChains][N] = {};
    PDARTS_UNROLL
    for (int j = 0; j < N; ++j) pivot[j] = load(chunk + lines.pixel_of(0, 0) * channels + lines.channel_of(j));
    round_lines(pivot, static_cast<BFloat*>(nullptr), false);
    const auto add = [&](int64_t i, int chain) PDARTS_LAMBDA {
      const int64_t at = lines.pixel_of(i, 0) * channels + lines.channel;
      Vec v[N];
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) v[j] = load(chunk + at + j * V);
      round_lines(v, y ? y + at : nullptr, past);
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) {
        const Vec off = v[j] - pivot[j];
        sum[chain][j] += off;
        square[chain][j] += off * off;
      }
    };
    in_chains<kLineChains>(lines.count, add);
    PDARTS_UNROLL
    for (int j = 0; j < N; ++j) {
      sum[0][j] += sum[1][j];
      square[0][j] += square[1][j];
    }
    int64_t count = lines.count;
    if (lines.pixels && N == 2) {
      count *= 2;
      sum[0][0] += sum[0][N - 1];
      square[0][0] += square[0][N - 1];
    }
    const float inverse = 1.0f / static_cast<float>(count);
    for (int j = 0; j < (lines.pixels ? 1 : N); ++j) {
      const Vec off = sum[0][j] * inverse;
      add_moments(into, before, static_cast<double>(count), lines.channel_of(j), pivot[j] + off,
                  relu(square[0][j] - sum[0][j] * off));
    }
    if (lines.pixels) before += static_cast<double>(count);
  });
  into.count += static_cast<double>(pixels);
}
#endif

// total[c] += chunk[c], float into double.
PDARTS_INLINE void add_sums(double* total, const float* chunk, int64_t count) {
  for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(chunk[c]);
}

// total[i] = sum over groups of part[group * stride + i] for i < count, in the order of the groups.
PDARTS_INLINE void sum_groups(const double* part, int64_t groups, int64_t stride, int64_t count,
                              double* total) {
  for (int64_t i = 0; i < count; ++i) total[i] = 0.0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < count; ++i) total[i] += part[g * stride + i];
}

// out(i, sum over groups of part[group * stride + i]) for i < count, in double and in the order of the
// groups.
template <class Out>
PDARTS_INLINE void sum_groups(const float* part, int64_t groups, int64_t stride, int64_t count,
                              Out out) {
  constexpr int64_t kBlock = 256;
  double total[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = min_of(kBlock, count - begin);
    for (int64_t i = 0; i < size; ++i) total[i] = 0.0;
    for (int64_t g = 0; g < groups; ++g) add_sums(total, part + g * stride + begin, size);
    for (int64_t i = 0; i < size; ++i) out(begin + i, static_cast<float>(total[i]));
  }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
