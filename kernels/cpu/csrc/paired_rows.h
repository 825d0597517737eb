// Images as the dense convolutions of dense.h read them, two rows side by side.
//
// A tile multiplies 16 pixels by 32 terms of a sum: the channels of two rows that a kernel's taps meet one
// after the other, those of a line. Two rows of outputs read the same lines with different weights:
//
//   plane row   i  i+1 | i+2 i+3 | i+4 i+5      kernel of 5, output rows i and i + 1 of a class
//   first       d0  d1 |  d2  d3 |  d4   0
//   second       0  d0 |  d1  d2 |  d3  d4
//
// With 3 taps a row the lines begin one row later. Rows of a dilated kernel skip some: a class is the rows
// whose numbers leave the same remainder.
#pragma once

#include "inputs.h"
#include "tiles.h"

namespace pdarts {
namespace PDARTS_VARIANT {

constexpr int64_t kLead = 2;  // rows of zeros in front of a class, columns likewise

#ifdef PDARTS_AMX

constexpr int64_t kLine = 2 * V;      // numbers of a line: two rows of a pixel
constexpr int64_t kLineBytes = 64;

// Pixels of a row in whole tiles.
PDARTS_INLINE int64_t tiled_width(int64_t width) {
  return (width + kTileSide - 1) / kTileSide * kTileSide;
}

// A zero-padded image as lines: [class][pair of rows][column][2][16].
struct PairedRows {
  BFloat* data;
  int64_t height, width, dilation;
  bool late;  // a line begins with an odd row

  // The class of a row, and its number in it. A dilation is 1 or 2, and to divide takes longer than to shift.
  int64_t class_of(int64_t row) const { return row & (dilation - 1); }
  int64_t number_of(int64_t row) const { return row >> (dilation - 1); }

  // Pairs of rows of a class; the first one has most.
  int64_t pairs(int64_t rest) const { return (number_of(height - rest + dilation - 1) + 1) / 2; }

  int64_t lines() const { return pairs(0) + kLead; }
  int64_t columns() const { return tiled_width(width) + 2 * kLead * dilation; }
  int64_t size() const { return dilation * lines() * columns() * kLine; }

  static PairedRows make(Scratch& scratch, int64_t height, int64_t width, int64_t dilation, bool late) {
    PairedRows p{nullptr, height, width, dilation, late};
    p.data = scratch.take<BFloat>(p.size());
    std::memset(p.data, 0, static_cast<size_t>(p.size()) * sizeof(BFloat));
    return p;
  }

  BFloat* line(int64_t rest, int64_t pair, int64_t column) const {
    return data + ((rest * lines() + pair) * columns() + column) * kLine;
  }

  // Where the first pixel of a row is; pixels are a line apart.
  BFloat* row(int64_t row) const {
    const int64_t place = number_of(row) + kLead - late;
    return line(class_of(row), place / 2, kLead * dilation) + place % 2 * V;
  }
};

// Two rows of a class, `dilation` apart; a last one may be alone.
struct RowPair {
  int64_t rest, row, count;
  int64_t number;  // of pairs before this one
};

// Pair `index` of a class.
PDARTS_INLINE RowPair pair_of(const PairedRows& plane, int64_t rest, int64_t index, int64_t number) {
  const int64_t row = rest + 2 * plane.dilation * index;
  return {rest, row, row + plane.dilation < plane.height ? 2 : 1, number};
}

// f(pair) for all rows of an image.
template <class F>
PDARTS_INLINE void each_pair(const PairedRows& plane, F f) {
  int64_t number = 0;
  for (int64_t rest = 0; rest < plane.dilation; ++rest)
    for (int64_t i = 0; i < plane.pairs(rest); ++i) f(pair_of(plane, rest, i, number++));
}

// f(first row, rows, numbers to their sums) for the sums of a pair: together where they follow one another.
template <class F>
PDARTS_INLINE void each_chunk(const PairedRows& plane, const RowPair& pair, F f) {
  const int64_t tiled = tiled_width(plane.width);
  if (plane.dilation == 1 && tiled == plane.width) return f(pair.row, pair.count, 0);
  for (int64_t i = 0; i < pair.count; ++i) f(pair.row + i * plane.dilation, 1, i * tiled * V);
}

// plane = f(pixel) for every pixel of the image, in all planes that are not null.
template <class F>
PDARTS_INLINE void fill_rows(int64_t height, int64_t width, const PairedRows* early, const PairedRows* late,
                             F f) {
  for (int64_t row = 0; row < height; ++row) {
    BFloat* first = early ? early->row(row) : nullptr;
    BFloat* second = late ? late->row(row) : nullptr;
    int64_t column = 0;
    for (; column + 1 < width; column += 2) {
      const __m512i line = both_pixels(f, row * width + column, row * width + column + 1);
      if (first) store_halves(first + column * kLine, kLine, line);
      if (second) store_halves(second + column * kLine, kLine, line);
    }
    if (column == width) continue;
    const Vec v = f(row * width + column);
    if (first) store(first + column * kLine, v);
    if (second) store(second + column * kLine, v);
  }
}

// Both planes = f(pixel) for every pixel of the image, with the channels of a line's rows in turns. `room` is for
// rows that are rounded, from a line's first one to its second.
template <class F>
PDARTS_INLINE void fill_in_turns(const PairedRows& early, const PairedRows& late, BFloat* room, F f) {
  const int64_t height = early.height, width = early.width, step = early.dilation;
  const auto rounded = [&](int64_t row) PDARTS_LAMBDA { return room + row % (step + 1) * width * V; };
  const auto round_row = [&](int64_t row) PDARTS_LAMBDA {
    BFloat* to = rounded(row);
    int64_t p = row * width;
    const int64_t end = p + width;
    for (; p + 1 < end; p += 2, to += 2 * V) store(to, both_pixels(f, p, p + 1));
    if (p < end) store(to, f(p));
  };
  // Lines of rows `row` and `row + step`.
  for (int64_t row = -step; row < height; ++row) {
    const int64_t next = row + step;
    if (next < height) round_row(next);
    else if (row < 0) continue;
    const bool is_late = early.number_of(next) % 2 == 0;
    BFloat* to = is_late ? late.row(next) - V : early.row(row);
    const BFloat* first = row < 0 ? nullptr : rounded(row);
    const BFloat* second = next < height ? rounded(next) : nullptr;
    const auto numbers = [](const BFloat* pixels, int64_t column)
                             PDARTS_LAMBDA { return pixels ? channels_of(pixels + column * V) : __m256i{}; };
    for (int64_t column = 0; column < width; ++column)
      store(to + column * kLine, in_turns(join(numbers(first, column), numbers(second, column))));
  }
}

// A thread's planes of an image, for the convolutions of a task.
struct DensePlanes {
  PairedRows all[2][2];  // [dilation - 1][late]
  BFloat* rows;          // see `fill_in_turns`

  static int64_t row_numbers(const Task& t) { return 3 * t.out_width * V; }

  // Those that a convolution reads.
  const PairedRows& of(const Branch& b) const { return all[b.dilation - 1][b.kernel == 3]; }

  // Calls f(early, late) for each dilation; null where there is no plane.
  template <class F>
  void each(F f) const {
    for (const PairedRows* planes : all) {
      const PairedRows* early = planes[0].data ? &planes[0] : nullptr;
      const PairedRows* late = planes[1].data ? &planes[1] : nullptr;
      if (early || late) f(early, late);
    }
  }

  // Room for what `make` takes.
  static int64_t bytes(const Task& t) {
    int64_t bytes = Scratch::bytes_for<BFloat>(row_numbers(t));
    for (int64_t dilation = 1; dilation <= 2; ++dilation) {
      const PairedRows plane{nullptr, t.out_height, t.out_width, dilation, false};
      bytes += 2 * Scratch::bytes_for<BFloat>(plane.size());
    }
    return bytes;
  }

  // Makes those that the task's convolutions read; `both` of each dilation for the weights' gradients.
  static DensePlanes make(const Task& t, Scratch& scratch, bool both) {
    bool read[2][2] = {};
    for (int64_t i = 0; i < t.num_branches; ++i) {
      const Branch& b = t.branches[i];
      if (b.kind != kConv) continue;
      bool* late = read[b.dilation - 1];
      late[0] |= both || b.kernel == 5;
      late[1] |= both || b.kernel == 3;
    }
    DensePlanes planes{};
    planes.rows = scratch.take<BFloat>(row_numbers(t));
    for (int i = 0; i < 2; ++i)
      for (int late = 0; late < 2; ++late)
        if (read[i][late])
          planes.all[i][late] = PairedRows::make(scratch, t.out_height, t.out_width, i + 1, late == 1);
    return planes;
  }
};

// Numbers of two rows of outputs in whole tiles.
PDARTS_INLINE int64_t pair_numbers(const Task& t) { return 2 * tiled_width(t.out_width) * V; }

#else

constexpr int64_t tiled_width(int64_t width) { return width; }

#endif  // PDARTS_AMX

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
