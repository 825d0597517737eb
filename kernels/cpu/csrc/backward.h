// What mid_backward and fan_in share: packed weights, partial sums, dy, and the product with W.
#pragma once

#include "dense.h"
#include "gather.h"
#include "parallel.h"
#include "statistics.h"
#include "stencils.h"
#include "tiles.h"

namespace pdarts {
namespace PDARTS_VARIANT {

template <class E>
struct BackwardBranch {
  float* depthwise;       // packed
  float* flipped;         // packed, turned by 180 degrees
  E* pointwise;           // W [C, depth], packed for dy W
  float* expanded;        // W before packing where it is not the parameter
  float* grad_depthwise;  // [groups][C / V][taps][V]
  float* grad_pointwise;  // [groups][C, depth]
  E* dense;               // W d of the input's gradient, see dense.h
};

// That of arrays of T.
template <class T>
using Packed = BackwardBranch<Operand<T>>;

PDARTS_INLINE bool has_weights(const Branch& b) {
  return !is_pool(b.kind) && b.kind != kSkip;
}

PDARTS_INLINE int64_t product_depth(const Task& t, const Branch& b) {
  return b.kind == kConv ? t.channels : gather_depth(t, b);
}

PDARTS_INLINE int64_t tap_count(const Branch& b) {
  return b.kind == kConv ? b.kernel * b.kernel : 0;
}

// A group's part of the weight gradients.
template <class E>
PDARTS_INLINE float* group_depthwise(const Task& t, const Branch& b,
                                     const BackwardBranch<E>& packed, int64_t group) {
  return packed.grad_depthwise + group * t.channels * tap_count(b);
}

template <class E>
PDARTS_INLINE float* group_pointwise(const Task& t, const Branch& b,
                                     const BackwardBranch<E>& packed, int64_t group) {
  return packed.grad_pointwise + group * t.channels * product_depth(t, b);
}

template <class E>
PDARTS_INLINE int64_t backward_bytes(const Task& t) {
  int64_t bytes = Scratch::bytes_for<BackwardBranch<float>>(t.num_branches);
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    if (!has_weights(b)) continue;
    const int64_t taps = tap_count(b) * t.channels, weights = product_depth(t, b) * t.channels;
    bytes += 2 * Scratch::bytes_for<float>(taps) + 2 * Scratch::bytes_for<float>(weights);
    bytes += Scratch::bytes_for<float>(t.groups * taps);
    bytes += Scratch::bytes_for<float>(t.groups * weights);
    bytes += Scratch::bytes_for<E>(dense_numbers(t, b));
  }
  return bytes;
}

// Room for what `pack_backward` and the groups write.
template <class E>
PDARTS_SHARED BackwardBranch<E>* prepare_backward(const Task& t, Scratch& scratch) {
  scratch.reset(backward_bytes<E>(t));
  BackwardBranch<E>* all = scratch.take<BackwardBranch<E>>(t.num_branches);
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    all[i] = BackwardBranch<E>{};
    if (!has_weights(b)) continue;
    const int64_t taps = t.channels * tap_count(b), weights = t.channels * product_depth(t, b);
    all[i].pointwise = scratch.take<E>(weights);
    if (b.kind == kFactorized) all[i].expanded = scratch.take<float>(weights);
    if (b.grad_pointwise) all[i].grad_pointwise = scratch.take<float>(t.groups * weights);
    if (b.kind != kConv) continue;
    all[i].depthwise = scratch.take<float>(taps);
    all[i].flipped = scratch.take<float>(taps);
    if (is_dense<E>(t)) all[i].dense = scratch.take<E>(dense_numbers(t, b));
    if (b.grad_depthwise) all[i].grad_depthwise = scratch.take<float>(t.groups * taps);
  }
  return all;
}

// Packs the weights of every branch: all threads call it and leave it together.
template <class E>
PDARTS_SHARED void pack_backward(const Task& t, const BackwardBranch<E>* all, Member& member) {
  each(member, t.num_branches, 1, [&](int64_t i) {
    const Branch& b = t.branches[i];
    if (!has_weights(b)) return;
    const int64_t taps = tap_count(b), depth = product_depth(t, b);
    if (b.kind == kFactorized) expand_weights(t, b, all[i].expanded);
    pack_panels(b.kind == kFactorized ? all[i].expanded : b.pointwise, depth, 1, t.channels, depth,
                all[i].pointwise);
    if (b.kind != kConv) return;
    pack_depthwise(b.depthwise, t.channels, taps, false, all[i].depthwise);
    pack_depthwise(b.depthwise, t.channels, taps, true, all[i].flipped);
#ifdef PDARTS_AMX
    if constexpr (std::is_same<E, BFloat>::value)
      if (all[i].dense) pack_dense(b, all[i].flipped, true, all[i].dense);
#endif
  });
  member.wait();
}

// Whether a group's weight gradients begin with row `row` of image n: nothing is there to add to.
PDARTS_INLINE bool begins_group(const Task& t, int64_t group, int64_t n, int64_t row) {
  return n == group_range(t, group).begin && row == 0;
}

// Gradient of the depthwise weights from the groups' partial ones.
PDARTS_INLINE void finish_depthwise(const Task& t, const Branch& b, const float* part) {
  const int64_t taps = tap_count(b);
  for (int64_t c = 0; c < t.channels; c += V)
    sum_groups(part + c * taps, t.groups, t.channels * taps, taps * V, [&](int64_t j, float v) {
      b.grad_depthwise[(c + j % V) * taps + j / V] = v;
    });
}

// Gradient of the pointwise weights from the groups' partial ones.
PDARTS_INLINE void finish_pointwise(const Task& t, const Branch& b, const float* part) {
  const int64_t all = t.channels * product_depth(t, b);
  if (b.kind != kFactorized) {
    sum_groups(part, t.groups, all, all, [&](int64_t j, float v) { b.grad_pointwise[j] = v; });
    return;
  }
  for (int64_t row = 0; row < t.channels; ++row)
    sum_groups(part + factorized_place(t, row), t.groups, all, t.in_channels,
               [&](int64_t j, float v) { b.grad_pointwise[row * t.in_channels + j] = v; });
}

// Weight gradients of every branch: all threads call it after their groups.
template <class E>
PDARTS_SHARED void finish_backward(const Task& t, const BackwardBranch<E>* all, Member& member) {
  member.wait();
  each(member, t.num_branches, 1, [&](int64_t i) {
    if (all[i].grad_pointwise) finish_pointwise(t, t.branches[i], all[i].grad_pointwise);
    if (all[i].grad_depthwise) finish_depthwise(t, t.branches[i], all[i].grad_depthwise);
  });
}

// dy = coef[0] * grad + coef[1] * y + coef[2] of a channel block, for pixels from `first` of the batch.
template <class T>
struct OutputGradient {
  const T *grad, *y;
  int64_t grad_stride, y_stride;
  Vec of_grad, of_y, constant;

  static OutputGradient of(const Task& t, const Branch& b, int64_t first, int64_t c) {
    return {static_cast<const T*>(b.grad) + first * b.grad_stride + c,
            static_cast<const T*>(b.y) + first * t.channels + c,
            b.grad_stride,
            t.channels,
            load(b.coef + c),
            load(b.coef + t.channels + c),
            load(b.coef + 2 * t.channels + c)};
  }

  PDARTS_INLINE_METHOD Vec operator()(int64_t p) const {
    // Two multiply-adds: sums are made from the left otherwise, of a product and two additions.
    return of_grad * load(grad + p * grad_stride) + (of_y * load(y + p * y_stride) + constant);
  }
};

// dy [pixels, C], for pixels from `first` of the batch.
template <class T, class E>
PDARTS_INLINE void output_gradient(const Task& t, const Branch& b, int64_t first, int64_t pixels,
                                   E* dy) {
  round_chunk(pixels, t.channels, dy,
              [&](int64_t c) PDARTS_LAMBDA { return OutputGradient<T>::of(t, b, first, c); });
}

// What output_gradient reads next: a gradient and y.
using GradientAhead = BothAhead<Ahead, Ahead>;

template <class T>
PDARTS_INLINE GradientAhead gradient_ahead(const Task& t, const Branch& b, int64_t pixel) {
  return {Ahead::of(static_cast<const T*>(b.grad) + pixel * b.grad_stride, b.grad_stride),
          Ahead::of(static_cast<const T*>(b.y) + pixel * t.channels, t.channels)};
}

// The convolution, of an image, that a thread works on after another.
struct Next {
  const Branch& branch;
  int64_t image;
};

template <class T>
PDARTS_INLINE GradientAhead next_ahead(const Task& t, const Next& next) {
  return gradient_ahead<T>(t, next.branch, next.image * t.out_height * t.out_width);
}

// grad (a plane) at `places` = dy [pixels, C] W.
template <class E, class A>
PDARTS_SHARED void product_into_plane(const E* dy, int64_t pixels, int64_t channels,
                                      const E* pointwise, const int32_t* places,
                                      const Plane& grad, const A& ahead) {
#ifdef PDARTS_AMX
  // Rows of whole tiles, which are stored where they belong.
  if constexpr (std::is_same<E, BFloat>::value)
    if (grad.width % kTileSide == 0)
      return product_tiles(
          dy, channels, pixels, channels, pointwise, channels, kLineBytes,
          [&](int64_t pixel, int64_t c)
              PDARTS_LAMBDA { return grad.data + c / V * grad.plane + places[pixel]; },
          [&](int64_t pixel, int64_t rows, int64_t c) PDARTS_LAMBDA {
            for (int64_t row = 0; row < rows; ++row) ahead.ask(pixel + row, c / V);
          });
#endif
  product(dy, channels, pixels, channels, pointwise, channels,
          [&](int64_t p, int64_t block, Vec v) {
            ahead.ask(p, block);
            store(grad.data + block * grad.plane + places[p], v);
          });
}

// out [rows, columns] = or, unless it begins, += a^T b over a chunk of pixels. Both have `operand_floats`.
template <class E>
PDARTS_SHARED void add_outer(E* a, int64_t rows, E* b, int64_t columns, int64_t pixels,
                             float* out, bool begins) {
  outer(left_side(a, pixels, rows), rows, right_side(b, pixels, columns), columns, pixels, out, begins);
}

// For a convolution and output rows [begin, end) of image n: the gradient of the depthwise output
// into `grad` (a plane), and the gradient of the pointwise weights from the recomputed depthwise
// output of `src`. `dy` and `a` hold a chunk each. `next` is what follows; if they are not null, the
// image's incoming gradient and a skip are read before that.
template <class T>
PDARTS_INLINE void pointwise_backward(const Task& t, const Branch& b,
                                      const Packed<T>& packed, int64_t group,
                                      int64_t n, int64_t begin, int64_t end, const Next& next,
                                      const Plane& src, const Plane& grad, const int32_t* places,
                                      Operand<T>* dy, Operand<T>* a,
                                      const Ahead* incoming = nullptr,
                                      const Ahead* skip = nullptr) {
  const int64_t channels = t.channels, width = t.out_width, pixels = (end - begin) * width;
  const int64_t image = n * t.out_height * width;
  output_gradient<T>(t, b, image + begin * width, pixels, dy);
  const GradientAhead ahead = end < t.out_height ? gradient_ahead<T>(t, b, image + end * width)
                                                 : next_ahead<T>(t, next);
  const auto into_plane = [&](const auto& asked) PDARTS_LAMBDA {
    const int32_t* at = places + begin * width;
    if (!incoming && !skip)
      return product_into_plane(dy, pixels, channels, packed.pointwise, at, grad, asked);
    const Ahead first = (incoming ? incoming : skip)->from(begin * width);
    const BothAhead<Ahead, Ahead> last{first, skip ? skip->from(begin * width) : first};
    product_into_plane(dy, pixels, channels, packed.pointwise, at, grad, BothAhead{asked, last});
  };
  const auto forward = [&](const Aheads& asked) PDARTS_LAMBDA {
    depthwise_chunk(b, src, packed.depthwise, channels, begin, end, width, asked, a);
  };
  if (!packed.grad_pointwise) return into_plane(ahead);
  if (kAskInStencils && b.stride == 1) {
    forward(Aheads::of(ahead.second));
    into_plane(NothingAhead{});
  } else {
    into_plane(ahead);
    forward({});
  }
  add_outer(dy, channels, a, channels, pixels, group_pointwise(t, b, packed, group),
            begins_group(t, group, n, begin));
}

// Gradient of the depthwise weights of one image.
template <class E>
PDARTS_INLINE void weights_backward(const Task& t, const Branch& b,
                                    const BackwardBranch<E>& packed, int64_t group, int64_t n,
                                    const Plane& src, const Plane& grad) {
  if (!packed.grad_depthwise) return;
  add_depthwise_weights(b, grad, src, t.channels / V, 4 * rows_per_chunk(t),
                        group_depthwise(t, b, packed, group), begins_group(t, group, n, 0));
}

#ifdef PDARTS_AMX
// A thread's arrays for the weight gradients of dense convolutions, an image at a time.
struct DenseGradients {
  DensePlanes planes;  // dy
  BFloat* turned;      // dy of a strip [pairs of rows][16][pixels of both]
  float* moments;      // M

  static int64_t turned_numbers(const Task& t) {
    return 2 * kStrip * tiled_width(t.out_width) * V;
  }

  static int64_t bytes(const Task& t) {
    return DensePlanes::bytes(t) + Scratch::bytes_for<BFloat>(turned_numbers(t)) +
           Scratch::bytes_for<float>(kMostTaps * V * V);
  }

  static DenseGradients make(const Task& t, Scratch& scratch) {
    return {DensePlanes::make(t, scratch, false), scratch.take<BFloat>(turned_numbers(t)),
            scratch.take<float>(kMostTaps * V * V)};
  }
};

// dy of a pair of rows into its plane and, unless that is null, turned: tiles with a channel a row, pixels of
// two rows in turns. Returns where those of the next pair begin. `dy` is a copy, which nothing overwrites.
PDARTS_SHARED BFloat* dense_gradient(OutputGradient<BFloat> dy, const PairedRows& plane, const RowPair& pair,
                                     BFloat* turned) {
  const int64_t row = pair.row, width = plane.width, step = plane.dilation * width;
  BFloat *first = plane.row(row), *second = plane.row(row + plane.dilation);
  const bool one_line = second == first + V;
  for (int64_t begin = 0; begin < width; begin += kTileSide) {
    const int64_t size = min_of(kTileSide, width - begin);
    __m512i pairs[V], to[V];
    for (int64_t i = 0; i < kTileSide; ++i) {
      if (i >= size) {
        pairs[i] = _mm512_setzero_si512();
        continue;
      }
      const int64_t column = begin + i, p = row * width + column;
      const __m512i line = as_line(dy(p), pair.count == 2 ? dy(p + step) : Vec{});
      if (one_line) {
        store(first + column * kLine, line);
      } else {
        store_halves(first + column * kLine, second - first, line);
      }
      pairs[i] = in_turns(line);
    }
    if (!turned) continue;
    transpose(pairs, to);
    PDARTS_UNROLL
    for (int i = 0; i < V; ++i, turned += kLine) store(turned, to[i]);
  }
  return turned;
}

// dy of a dense convolution of image n into its plane, and its weight gradients if they are wanted, for which
// `input` has v in turns. Asks `ahead` for as many pixels then. Needs `WholeTiles`.
PDARTS_SHARED void dense_gradients(const Task& t, const Branch& b, const BackwardBranch<BFloat>& packed,
                                   int64_t group, int64_t n, const DensePlanes& input,
                                   const DenseGradients& w, const Ahead& ahead) {
  const auto dy = OutputGradient<BFloat>::of(t, b, n * t.out_height * t.out_width, 0);
  const PairedRows& plane = w.planes.of(b);
  if (!packed.grad_pointwise)
    return each_pair(plane, [&](const RowPair& pair) { dense_gradient(dy, plane, pair, nullptr); });
  const auto turn = [&](int64_t rest, int64_t begin, int64_t end) {
    BFloat* turned = w.turned;
    for (int64_t i = begin; i < end; ++i) turned = dense_gradient(dy, plane, pair_of(plane, rest, i, 0), turned);
  };
  const PairedRows* planes = input.all[b.dilation - 1];
  b.kernel == 3 ? dense_weights<3>(w.turned, planes, ahead, w.moments, turn)
                : dense_weights<5>(w.turned, planes, ahead, w.moments, turn);
  add_weight_gradients(b, packed.depthwise, w.moments, group_depthwise(t, b, packed, group),
                       group_pointwise(t, b, packed, group), begins_group(t, group, n, 0));
}
#endif

PDARTS_INLINE int64_t widest_padding(const Task& t) {
  int64_t padding = 0;
  for (int64_t i = 0; i < t.num_branches; ++i)
    if (t.branches[i].kind == kConv && t.branches[i].padding > padding)
      padding = t.branches[i].padding;
  return padding;
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
