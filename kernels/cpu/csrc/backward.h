// What mid_backward and fan_in share: packed weights, partial sums, dy, and the product with W.
#pragma once

#include "depthwise.h"
#include "gather.h"
#include "product.h"
#include "statistics.h"

namespace pdarts {
namespace PDARTS_VARIANT {

struct BackwardBranch {
  float* depthwise;       // packed
  float* flipped;         // packed, turned by 180 degrees
  float* pointwise;       // W [C, depth], packed for dy W
  float* grad_depthwise;  // [groups][C / V][taps][V]
  float* grad_pointwise;  // [groups][C, depth]
};

PDARTS_INLINE bool has_weights(const Branch& b) {
  return b.kind == kConv || b.kind == kFactorized || b.kind == kPointwise;
}

PDARTS_INLINE int64_t product_depth(const Task& t, const Branch& b) {
  return b.kind == kConv ? t.channels : gather_depth(t, b);
}

PDARTS_INLINE int64_t tap_count(const Branch& b) {
  return b.kind == kConv ? b.kernel * b.kernel : 0;
}

PDARTS_INLINE int64_t backward_bytes(const Task& t) {
  int64_t bytes = Scratch::bytes_for<BackwardBranch>(t.num_branches);
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    if (!has_weights(b)) continue;
    const int64_t taps = tap_count(b) * t.channels, weights = product_depth(t, b) * t.channels;
    bytes += 2 * Scratch::bytes_for<float>(taps) + 2 * Scratch::bytes_for<float>(weights);
    bytes += Scratch::bytes_for<float>(t.groups * taps);
    bytes += Scratch::bytes_for<float>(t.groups * weights);
  }
  return bytes;
}

PDARTS_INLINE float* zeros(Scratch& scratch, int64_t count) {
  float* p = scratch.take<float>(count);
  std::memset(p, 0, static_cast<size_t>(count) * sizeof(float));
  return p;
}

PDARTS_SHARED BackwardBranch* prepare_backward(const Task& t, Scratch& scratch) {
  scratch.reset(backward_bytes(t));
  BackwardBranch* all = scratch.take<BackwardBranch>(t.num_branches);
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    all[i] = BackwardBranch{};
    if (!has_weights(b)) continue;
    const int64_t taps = tap_count(b), depth = product_depth(t, b), channels = t.channels;
    all[i].pointwise = scratch.take<float>(channels * depth);
    const float* dense = b.pointwise;
    if (b.kind != kConv) {
      float* expanded = scratch.take<float>(channels * depth);
      expand_weights(t, b, expanded);
      dense = expanded;
    }
    pack_panels(dense, depth, 1, channels, depth, all[i].pointwise);
    if (b.grad_pointwise) all[i].grad_pointwise = zeros(scratch, t.groups * channels * depth);
    if (b.kind != kConv) continue;
    all[i].depthwise = scratch.take<float>(channels * taps);
    pack_depthwise(b.depthwise, channels, taps, false, all[i].depthwise);
    all[i].flipped = scratch.take<float>(channels * taps);
    pack_depthwise(b.depthwise, channels, taps, true, all[i].flipped);
    if (b.grad_depthwise) all[i].grad_depthwise = zeros(scratch, t.groups * channels * taps);
  }
  return all;
}

// Weight gradients of every branch from the groups' partial ones.
PDARTS_SHARED void finish_backward(const Task& t, const BackwardBranch* all) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(t.threads))
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    const int64_t taps = tap_count(b);
    if (all[i].grad_pointwise)
      sum_groups(all[i].grad_pointwise, t.groups, t.channels * product_depth(t, b),
                 [&](int64_t j, float v) {
                   const int64_t to = b.kind == kConv ? j : weight_index(t, b, j);
                   if (to >= 0) b.grad_pointwise[to] = v;
                 });
    if (all[i].grad_depthwise)
      sum_groups(all[i].grad_depthwise, t.groups, t.channels * taps, [&](int64_t j, float v) {
        const int64_t c = j / (taps * V) * V + j % V;
        b.grad_depthwise[c * taps + j / V % taps] = v;
      });
  }
}

// dy [pixels, C] = coef[0] * grad + coef[1] * y + coef[2], for pixels from `first` of the batch.
template <class T>
PDARTS_INLINE void output_gradient(const Task& t, const Branch& b, int64_t first, int64_t pixels,
                                   float* dy) {
  const int64_t channels = t.channels;
  const T* g = static_cast<const T*>(b.grad) + first * b.grad_stride;
  const T* y = static_cast<const T*>(b.y) + first * channels;
  for (int64_t c = 0; c < channels; c += V) {
    const Vec first = load(b.coef + c), second = load(b.coef + channels + c);
    const Vec third = load(b.coef + 2 * channels + c);
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec grad = load(g + p * b.grad_stride + c), of_y = load(y + p * channels + c);
      store(dy + p * channels + c, first * grad + second * of_y + third);
    }
  }
}

// dy [pixels, C] += coef[0] * grad, for pixels from `first` of the batch.
template <class T>
PDARTS_INLINE void add_scaled_gradient(const Task& t, const Branch& b, int64_t first,
                                       int64_t pixels, float* dy) {
  const T* g = static_cast<const T*>(b.grad) + first * b.grad_stride;
  for (int64_t c = 0; c < t.channels; c += V) {
    const Vec factor = load(b.coef + c);
    for (int64_t p = 0; p < pixels; ++p) {
      float* o = dy + p * t.channels + c;
      store(o, load(o) + factor * load(g + p * b.grad_stride + c));
    }
  }
}

// What output_gradient reads next.
struct GradientAhead {
  Ahead grad, y;
};

template <class T>
PDARTS_INLINE GradientAhead gradient_ahead(const Task& t, const Branch& b, int64_t pixel) {
  return {Ahead::of(static_cast<const T*>(b.grad) + pixel * b.grad_stride, b.grad_stride),
          Ahead::of(static_cast<const T*>(b.y) + pixel * t.channels, t.channels)};
}

// grad (a plane) at `places` = dy [pixels, C] W.
PDARTS_SHARED void product_into_plane(const float* dy, int64_t pixels, int64_t channels,
                                      const float* pointwise, const int32_t* places,
                                      const Plane& grad, const GradientAhead& ahead) {
  product(dy, channels, pixels, channels, pointwise, channels,
          [&](int64_t p, int64_t block, Vec v) {
            ahead.grad.ask(p, block);
            ahead.y.ask(p, block);
            store(grad.data + block * grad.plane + places[p], v);
          });
}

// out [rows, columns] += a^T b over a chunk of pixels.
PDARTS_SHARED void add_outer(const float* a, int64_t rows, const float* b, int64_t columns,
                             int64_t pixels, float* out) {
  outer(a, rows, b, columns, pixels, out);
}

// For a convolution and output rows [begin, end) of image n: the gradient of the depthwise output
// into `grad` (a plane), and the gradient of the pointwise weights from the recomputed depthwise
// output of `src`. `dy` and `a` hold a chunk each. `next` is the convolution after this one.
template <class T>
PDARTS_INLINE void pointwise_backward(const Task& t, const Branch& b, const BackwardBranch& packed,
                                      int64_t group, int64_t n, int64_t begin, int64_t end,
                                      const Branch& next, const Plane& src, const Plane& grad,
                                      const int32_t* places, float* dy, float* a) {
  const int64_t channels = t.channels, width = t.out_width, pixels = (end - begin) * width;
  const int64_t image = n * t.out_height * width;
  output_gradient<T>(t, b, image + begin * width, pixels, dy);
  const GradientAhead ahead = end < t.out_height ? gradient_ahead<T>(t, b, image + end * width)
                                                 : gradient_ahead<T>(t, next, image);
  product_into_plane(dy, pixels, channels, packed.pointwise, places + begin * width, grad, ahead);
  if (!packed.grad_pointwise) return;
  depthwise_chunk(b, src, packed.depthwise, channels, begin, end, width, a);
  add_outer(dy, channels, a, channels, pixels,
            packed.grad_pointwise + group * channels * channels);
}

// Gradient of the depthwise weights of one image.
PDARTS_SHARED void weights_backward(const Task& t, const Branch& b, const BackwardBranch& packed,
                                    int64_t group, const Plane& src, const Plane& grad) {
  if (!packed.grad_depthwise) return;
  float* out = packed.grad_depthwise + group * t.channels * b.kernel * b.kernel;
  with_kernel(b, [&](auto k, auto d, auto s) {
    depthwise_weights<k.value, d.value, s.value>(grad, src, b.padding, t.channels / V,
                                                 4 * rows_per_chunk(t), out);
  });
}

PDARTS_INLINE int64_t widest_padding(const Task& t) {
  int64_t padding = 0;
  for (int64_t i = 0; i < t.num_branches; ++i)
    if (t.branches[i].kind == kConv && t.branches[i].padding > padding)
      padding = t.branches[i].padding;
  return padding;
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
