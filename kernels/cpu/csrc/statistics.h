// Channel statistics: within a chunk in float, everything longer in double and in a fixed order.
#pragma once

#include "scratch.h"

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
PDARTS_INLINE void add_moments(Moments& into, double before, double count, int64_t c, Vec mean, Vec squares) {
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
// The vectors of a chunk [pixels, channels] that make up lines of bfloat16: two pixels of one vector, or
// two vectors of a pixel. A line begins `step` numbers after the last one.
struct Lines {
  int64_t begin, step, count;
  int64_t channel[2];
};

// f(lines, Int<2>) for all vectors of a chunk that have a neighbour, f(lines, Int<1>) for the others.
template <class F>
PDARTS_INLINE void each_line(int64_t pixels, int64_t channels, F f) {
  if (channels == V) {
    f(Lines{0, 2 * V, pixels / 2, {0, 0}}, Int<2>{});
    if (pixels % 2) f(Lines{(pixels - 1) * V, V, 1, {0, 0}}, Int<1>{});
    return;
  }
  int64_t c = 0;
  for (; c + 2 * V <= channels; c += 2 * V) f(Lines{c, channels, pixels, {c, c + V}}, Int<2>{});
  if (c < channels) f(Lines{c, channels, pixels, {c, c}}, Int<1>{});
}

// Whether all lines of a chunk can be written past the caches.
PDARTS_INLINE bool can_stream_lines(const BFloat* to, int64_t channels) {
  return can_stream(to) && (channels == V || channels % (2 * V) == 0);
}

// A line or, of one vector, half of one.
template <int N>
PDARTS_INLINE void put_line(BFloat* to, __m512i line, bool past) {
  if (N == 1) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(line));
  else if (past) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
  else _mm512_storeu_si512(to, line);
}

// As above. Deviations are from the first pixel: their mean's square, which is subtracted, is at most
// `pixels` times the variance, and is about as large on average.
PDARTS_SHARED void finish_chunk(Moments& into, const float* chunk, int64_t pixels, int64_t channels,
                                BFloat* y) {
  const bool past = y && can_stream_lines(y, channels);
  double done = into.count;
  each_line(pixels, channels, [&](const Lines& lines, auto n) PDARTS_LAMBDA {
    constexpr int N = n.value, kChains = 2;
    const auto line_at = [&](int64_t i) PDARTS_LAMBDA {
      const float* p = chunk + lines.begin + i * lines.step;
      const __m512i line = as_line(load(p), N == 2 ? load(p + V) : Vec{});
      if (y) put_line<N>(y + lines.begin + i * lines.step, line, past);
      return line;
    };
    const bool same = N == 2 && lines.channel[0] == lines.channel[1];
    Vec sum[kChains][N] = {}, square[kChains][N] = {}, pivot[N];
    const auto begin = as_line(load(chunk + lines.begin), N == 2 ? load(chunk + lines.begin + V) : Vec{});
    pivot[0] = half_of<0>(begin);
    if constexpr (N == 2) pivot[1] = same ? pivot[0] : half_of<1>(begin);
    const auto add = [&](int64_t i, int chain) PDARTS_LAMBDA {
      const __m512i line = line_at(i);
      const Vec first = half_of<0>(line) - pivot[0];
      sum[chain][0] += first;
      square[chain][0] += first * first;
      if constexpr (N == 2) {
        const Vec second = half_of<1>(line) - pivot[1];
        sum[chain][1] += second;
        square[chain][1] += second * second;
      }
    };
    int64_t i = 0;
    for (; i + kChains <= lines.count; i += kChains) {
      PDARTS_UNROLL
      for (int chain = 0; chain < kChains; ++chain) add(i + chain, chain);
    }
    for (; i < lines.count; ++i) add(i, 0);
    if (!lines.count) return;
    const int64_t count = same ? 2 * lines.count : lines.count;
    const float inverse = 1.0f / static_cast<float>(count);
    for (int half = 0; half < (same ? 1 : N); ++half) {
      Vec total = sum[0][half] + sum[1][half], squares = square[0][half] + square[1][half];
      if (same) total += sum[0][N - 1] + sum[1][N - 1];
      if (same) squares += square[0][N - 1] + square[1][N - 1];
      const Vec off = total * inverse;
      add_moments(into, done, static_cast<double>(count), lines.channel[half], pivot[half] + off,
                  maximum(squares - total * off, Vec{}));
    }
    if (channels == V) done += static_cast<double>(count);
  });
  into.count += static_cast<double>(pixels);
}
#endif

// total[c] += chunk[c], float into double.
PDARTS_INLINE void add_sums(double* total, const float* chunk, int64_t count) {
  for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(chunk[c]);
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
