// What a thread of fan_in works with, and how large it is.
#pragma once

#include "backward.h"
#include "dropout.h"
#include "pooling.h"

namespace pdarts {
namespace PDARTS_VARIANT {

// What a thread works on: one image.
struct Work {
  Plane x;        // relu(x)
  Plane dx;       // of the depthwise convolutions, before the mask of the ReLU
  Plane grad;     // of one depthwise output
  float* raw;      // gradient of x itself: a row, or [in pixels, Cx] where products add to it
  float* maximum;  // lines of pools, see pooling.h
  float* average;
  float* dy;       // a chunk; two where two products are all there is
  float* a;        // a chunk
  float* second;   // a chunk of the second one of those
  float* factors;
  float* sums;      // [kSumChains, 2, Cx]: of an image's out and out * x
  int32_t* places;  // of every output pixel in a channel block of grad
#ifdef PDARTS_AMX
  DensePlanes input;  // relu(x), two rows in turns
  DenseGradients dense;
#endif
};

// Sums over the pixels of a row alternate between these.
constexpr int64_t kSumChains = 4;

struct Sizes {
  int64_t x, dx, grad, raw, maximum, average, dy, a, second, factors, sums;
  int64_t padding;
  bool conv;
  bool dense;    // all convolutions are, see dense.h
  bool weights;  // their gradients are wanted
  bool strided;  // a convolution of stride 2: it does not reach every pixel
  bool gathered;  // a product adds to the gradient of x itself
  bool lone;  // one convolution that is a single product, or two of the same pixels, and nothing else
};

template <class T>
PDARTS_INLINE Sizes sizes_of(const Task& t) {
  Sizes s{};
  s.dense = is_dense<T>(t);
  s.padding = widest_padding(t);
  int64_t depth = t.channels;
  bool others = false;
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    s.conv |= b.kind == kConv;
    s.weights |= b.grad_depthwise != nullptr;
    s.strided |= b.kind == kConv && b.stride != 1;
    others |= b.kind != kConv;
    s.gathered |= b.kind == kPointwise || b.kind == kFactorized;
    if (has_weights(b) && product_depth(t, b) > depth) depth = product_depth(t, b);
  }
  const int64_t blocks = t.channels / V;
  // A dense convolution writes pairs of rows, in whole tiles.
  if (s.dense) s.dx = Plane::floats(t.in_height + kLead, tiled_width(t.in_width), 0, blocks);
  else if (s.conv) s.dx = Plane::floats(t.in_height, t.in_width, s.padding, blocks);
  if (s.conv && !s.dense) s.x = s.dx;
  if (s.conv && !s.dense) s.grad = Plane::floats(t.out_height, t.out_width, s.padding, blocks);
  const auto is_pointwise = [&](int64_t i) { return t.branches[i].kind == kPointwise; };
  s.lone = t.num_branches == 1   ? is_pointwise(0) || t.branches[0].kind == kPatches
           : t.num_branches == 2 ? is_pointwise(0) && is_pointwise(1)
                                 : false;
  others &= !s.lone;
  s.raw = others ? (s.gathered ? t.in_height : 1) * t.in_width * t.in_channels : 0;
  s.maximum = pool_floats(t, MaximumBackward<T>::kLines);
  s.average = pool_floats(t, AverageBackward<T>::kLines);
  s.dy = (s.lone ? t.num_branches : 1) * operand_floats(chunk_pixels(t), t.channels);
  s.a = operand_floats(chunk_pixels(t), depth);
  s.second = s.lone && t.num_branches == 2 ? operand_floats(chunk_pixels(t), t.in_channels) : 0;
  s.factors = dropout_floats(t.in_width * t.channels) + t.channels + V;
  s.sums = t.sums ? kSumChains * 2 * t.in_channels : 0;
  return s;
}

template <class T>
PDARTS_INLINE Work make_work(const Task& t, const Sizes& s, Scratch& local) {
  const int64_t all[] = {s.x,  s.dx, s.grad,   s.raw,     s.maximum, s.average,
                         s.dy, s.a,  s.second, s.factors, s.sums};
  int64_t bytes = 0;
  for (const int64_t count : all) bytes += Scratch::bytes_for<float>(count);
  bytes += Scratch::bytes_for<int32_t>(t.out_height * t.out_width);
#ifdef PDARTS_AMX
  if (s.dense) bytes += DensePlanes::bytes(t) + DenseGradients::bytes(t);
#endif
  local.reset(bytes);
  Work w{};
  const int64_t blocks = t.channels / V;
  if (s.x) w.x = Plane::make(local, t.in_height, t.in_width, s.padding, blocks);
  if (s.dense) w.dx = Plane::make(local, t.in_height + kLead, tiled_width(t.in_width), 0, blocks);
  else if (s.dx) w.dx = Plane::make(local, t.in_height, t.in_width, s.padding, blocks);
  if (s.grad) w.grad = Plane::make(local, t.out_height, t.out_width, s.padding, blocks);
  w.places = local.take<int32_t>(t.out_height * t.out_width);
  if (s.grad) pixel_places(w.grad, w.places);
#ifdef PDARTS_AMX
  if (s.dense) {
    w.input = DensePlanes::make(t, local, true);
    w.dense = DenseGradients::make(t, local);
  }
#endif
  w.raw = local.take<float>(s.raw);
  w.maximum = local.take<float>(s.maximum);
  w.average = local.take<float>(s.average);
  w.dy = local.take<float>(s.dy);
  w.a = local.take<float>(s.a);
  w.second = local.take<float>(s.second);
  w.factors = local.take<float>(s.factors);
  w.sums = local.take<float>(s.sums);
  std::memset(w.factors, 0, static_cast<size_t>(s.factors) * sizeof(float));
  return w;
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
