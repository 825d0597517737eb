// Results on their way from float32 to storage. A vector of bfloat16 is half a line of the cache: two are
// rounded at a time, in one conversion instead of two, and whole lines can be written past the caches.
#pragma once

#include <type_traits>

#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

#ifdef PDARTS_BF16
// Two vectors as a line of bfloat16, in one conversion, and each of them back.
PDARTS_INLINE __m512i as_line(Vec first, Vec second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

template <int Which>
PDARTS_INLINE Vec half_of(__m512i line) {
  const __m512i places = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6,
                                          0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i from = Which ? _mm512_add_epi16(places, _mm512_set1_epi16(V)) : places;
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, line);
}

// Vectors of a chunk [pixels, channels] that are rounded together: whole lines of bfloat16, in the order in
// which they lie. The next ones begin `step` pixels further.
struct Lines {
  int64_t pixel, step, count, channel;
  bool pixels;  // the vectors are pixels of channels [channel, channel + V), not channels of a pixel

  int64_t channel_of(int64_t vector) const { return pixels ? channel : channel + vector * V; }

  // Of vector `vector` of line i.
  int64_t pixel_of(int64_t i, int64_t vector) const { return pixel + i * step + (pixels ? vector : 0); }
};

// f(lines, Int<vectors>) for all vectors of a chunk: two pixels of one vector, four or two vectors of a pixel,
// or one that is left.
template <class F>
PDARTS_INLINE void each_line(int64_t pixels, int64_t channels, F f) {
  if (channels == V) {
    f(Lines{0, 2, pixels / 2, 0, true}, Int<2>{});
    if (pixels % 2) f(Lines{pixels - 1, 1, 1, 0, true}, Int<1>{});
    return;
  }
  int64_t c = 0;
  for (; c + 4 * V <= channels; c += 4 * V) f(Lines{0, 1, pixels, c, false}, Int<4>{});
  for (; c + 2 * V <= channels; c += 2 * V) f(Lines{0, 1, pixels, c, false}, Int<2>{});
  if (c < channels) f(Lines{0, 1, pixels, c, false}, Int<1>{});
}

// Whether all lines of a chunk can be written past the caches.
PDARTS_INLINE bool can_stream_lines(const BFloat* to, int64_t channels) {
  return can_stream(to) && (channels == V || channels % (2 * V) == 0);
}

// Rounds N vectors that follow one another, writes them to `to` unless it is null, and gives back what is
// written.
template <int N>
PDARTS_INLINE void round_lines(Vec (&v)[N], BFloat* to, bool past) {
  if constexpr (N == 1) {
    if (to) store(to, v[0]);
    v[0] = half_of<0>(as_line(v[0], v[0]));
  } else {
    PDARTS_UNROLL
    for (int i = 0; i < N; i += 2) {
      const __m512i line = as_line(v[i], v[i + 1]);
      if (to && past) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * V), line);
      else if (to) store(to + i * V, line);
      v[i] = half_of<0>(line);
      v[i + 1] = half_of<1>(line);
    }
  }
}

// Chains of sums over lines, see `in_chains`.
constexpr int kLineChains = 2;

// As below, for bfloat16.
template <class F, class Seen>
PDARTS_INLINE void write_rows(int64_t pixels, int64_t channels, BFloat* out, int64_t stride, bool past,
                              F value, Seen seen) {
  past &= can_stream_lines(out, channels) && (stride == channels || (channels > V && stride % (2 * V) == 0));
  const auto write = [&](const Lines& lines, auto vectors) PDARTS_LAMBDA {
    constexpr int N = vectors.value;
    for (int64_t i = 0; i < lines.count; ++i) {
      Vec v[N];
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) v[j] = value(lines.pixel_of(i, j), lines.channel_of(j));
      round_lines(v, out + lines.pixel_of(i, 0) * stride + lines.channel, past);
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) seen(lines.pixel_of(i, j), lines.channel_of(j), v[j]);
    }
  };
  if (channels > V || stride == V) return each_line(pixels, channels, write);
  for (int64_t p = 0; p < pixels; ++p) write(Lines{p, 1, 1, 0, true}, Int<1>{});
}

// What is read of two vectors once they are stored.
template <class T>
PDARTS_INLINE void round_both(Vec& first, Vec& second) {
  if constexpr (std::is_same<T, BFloat>::value) {
    const __m512i line = as_line(first, second);
    first = half_of<0>(line);
    second = half_of<1>(line);
  }
}

// Stores half a line at `to` and the other one at `to + step`.
PDARTS_INLINE void store_halves(BFloat* to, int64_t step, __m512i line) {
  store(to, _mm512_castsi512_si256(line));
  store(to + step, _mm512_extracti64x4_epi64(line, 1));
}

PDARTS_INLINE void store_both(BFloat* to, int64_t step, Vec first, Vec second) {
  store_halves(to, step, as_line(first, second));
}
#else
template <class T>
PDARTS_INLINE void round_both(Vec& first, Vec& second) {
  first = as_stored<T>(first);
  second = as_stored<T>(second);
}
#endif

template <class T>
PDARTS_INLINE void store_both(T* to, int64_t step, Vec first, Vec second) {
  store(to, first);
  store(to + step, second);
}

#ifdef PDARTS_BF16
// As below, for bfloat16.
template <class F>
PDARTS_INLINE void round_chunk(int64_t pixels, int64_t channels, BFloat* out, F of_channels) {
  each_line(pixels, channels, [&](const Lines& lines, auto vectors) PDARTS_LAMBDA {
    constexpr int N = vectors.value;
    decltype(of_channels(0)) values[N];
    PDARTS_UNROLL
    for (int j = 0; j < N; ++j) values[j] = of_channels(lines.channel_of(j));
    for (int64_t i = 0; i < lines.count; ++i) {
      Vec v[N];
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) v[j] = values[j](lines.pixel_of(i, j));
      round_lines(v, out + lines.pixel_of(i, 0) * channels + lines.channel, false);
    }
  });
}
#endif

// out [pixels, channels] = of_channels(c)(p) for channels [c, c + V) of every pixel.
template <class T, class F>
PDARTS_INLINE void round_chunk(int64_t pixels, int64_t channels, T* out, F of_channels) {
  for (int64_t c = 0; c < channels; c += V) {
    const auto value = of_channels(c);
    for (int64_t p = 0; p < pixels; ++p) store(out + p * channels + c, value(p));
  }
}

// out[p * stride + c] = value(p, c) for channels [c, c + V) of every pixel, past the caches if that is
// wanted and possible; then seen(p, c, what is stored).
template <class T, class F, class Seen>
PDARTS_INLINE void write_rows(int64_t pixels, int64_t channels, T* out, int64_t stride, bool past,
                              F value, Seen seen) {
  past &= can_stream(out);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += V) {
      T* o = out + p * stride + c;
      const Vec v = value(p, c);
      past ? stream(o, v) : store(o, v);
      seen(p, c, as_stored<T>(v));
    }
}

template <class T, class F>
PDARTS_INLINE void write_rows(int64_t pixels, int64_t channels, T* out, int64_t stride, bool past,
                              F value) {
  write_rows(pixels, channels, out, stride, past, value, [](int64_t, int64_t, Vec) PDARTS_LAMBDA {});
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
