// fan_in: the gradient of one state x from every operation of every edge that leaves it.
//   dy = coef[0] * grad + coef[1] * y + coef[2]
//   out = incoming + (x > 0) * sum of depthwise^T(dy W) + pools + 1x1 convolutions + skips
//   sums = sum of out, sum of out * x
// and the weight gradients of first halves, dilated and 1x1 convolutions (recomputing their
// depthwise output from x), and of patches. A skip gives scale * dropout(grad).
#include "fan_in_work.h"
#include "primitives.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch shared_scratch, sums_scratch, local_scratch;

// dx = the transposed depthwise convolution of grad, added to what is there unless it is the `first`.
template <class E, class A>
PDARTS_SHARED void add_transposed(const Branch& b, const BackwardBranch<E>& packed, int64_t blocks,
                                  const Plane& grad, const Plane& dx, bool first, const A& ahead) {
  with_kernel(b, [&](auto k, auto d, auto s) {
    if constexpr (s.value == 1)
      depthwise_rows<k.value, d.value, 1>(
          grad, b.padding, packed.flipped, blocks, 0, dx.height, dx.width, ahead,
          [&](int64_t row, int64_t column, int64_t block, Vec v) {
            float* o = dx.at(block, row, column);
            store(o, first ? v : load(o) + v);
          });
    else
      depthwise_transposed_2<k.value, d.value>(grad, packed.depthwise, b.padding, blocks, dx);
  });
}

#ifdef PDARTS_AMX
// Adds the gradient of a dense convolution's input, from its dy, to w.dx, or begins it.
PDARTS_INLINE void add_dense(const Task& t, const Branch& b, const Packed<BFloat>& packed, const Work& w,
                             bool begins, const Aheads& ahead) {
  const PairedRows& plane = w.dense.planes.of(b);
  each_pair(plane, [&](const RowPair& pair) PDARTS_LAMBDA {
    // A last row alone has another one, which nobody reads, behind it.
    dense_rows(b, plane, packed.dense, pair, w.dx.at(0, pair.row, 0), w.dx.at(0, pair.row + b.dilation, 0),
               !begins, ahead);
  });
}
#endif

// Adds a depthwise-pointwise convolution to w.dx, or begins it.
template <class T>
void conv_backward(const Task& t, const Sizes& s, const Branch& b, const Packed<T>& packed, int64_t group,
                   int64_t n, const Next& next, const Work& w, bool begins) {
  const int64_t rows = rows_per_chunk(t), pixels = t.out_height * t.out_width;
  const Ahead* after[2] = {};
  Ahead incoming, skip;
  if (next.image != n && t.incoming) {
    incoming = Ahead::of(
        static_cast<const T*>(t.incoming) + n * pixels * t.incoming_stride, t.incoming_stride);
    after[0] = &incoming;
  }
  const Branch& last = t.branches[t.num_branches - 1];
  if (next.image != n && last.kind == kSkip) {
    skip = Ahead::of(static_cast<const T*>(last.grad) + n * pixels * last.grad_stride,
                     last.grad_stride);
    after[1] = &skip;
  }
#ifdef PDARTS_AMX
  if constexpr (std::is_same<T, BFloat>::value)
    if (s.dense) {
      WholeTiles whole;
      const GradientAhead gradient = next_ahead<T>(t, next);
      dense_gradients(t, b, packed, group, n, w.input, w.dense, gradient.second);
      Aheads asked;
      asked.add(gradient.first);
      if (!packed.grad_pointwise) asked.add(gradient.second);
      for (const Ahead* one : after)
        if (one) asked.add(*one);
      add_dense(t, b, packed, w, begins, asked);
      return;
    }
#endif
  for (int64_t begin = 0; begin < t.out_height; begin += rows)
    pointwise_backward<T>(t, b, packed, group, n, begin, min_of(t.out_height, begin + rows), next,
                          w.x, w.grad, w.places, operands<T>(w.dy), operands<T>(w.a), after[0],
                          after[1]);
  add_transposed(b, packed, t.channels / V, w.grad, w.dx, begins,
                 ahead_if<kAskInStencils>(next_ahead<T>(t, next).first));
  weights_backward(t, b, packed, group, n, w.x, w.grad);
}

// Gradient of the weights of a 1x1 convolution or factorized reduce; w.dy holds its dy.
template <class T>
void gathered_weights(const Task& t, const Branch& b, const Packed<T>& packed, int64_t group,
                      int64_t n, const T* image, int64_t begin, int64_t end, const Work& w) {
  if (!packed.grad_pointwise) return;
  Operand<T>* a = operands<T>(w.a);
  gather(t, b, image, begin, end, a);
  add_outer(operands<T>(w.dy), t.channels, a, product_depth(t, b), (end - begin) * t.out_width,
            group_pointwise(t, b, packed, group), begins_group(t, group, n, begin));
}

// Adds a 1x1 convolution or factorized reduce of relu(x), output rows [begin, end), to w.raw.
template <class T>
void gathered_backward(const Task& t, const Branch& b, const Packed<T>& packed, int64_t group,
                       int64_t n, const T* image, int64_t begin, int64_t end, const Work& w) {
  const int64_t width = t.out_width, pixels = (end - begin) * width, cx = t.in_channels;
  const int64_t depth = product_depth(t, b);
  output_gradient<T>(t, b, (n * t.out_height + begin) * width, pixels,
                     operands<T>(w.dy));
  product_rows(operands<T>(w.dy), t.channels, pixels, t.channels, packed.pointwise, depth, w.a,
               NothingAhead{});
  const int64_t phases = depth / cx;
  const Parts parts = Parts::of(t);
  const float* a = w.a;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < width; ++column)
      for (int64_t phase = 0; phase < phases; ++phase, a += cx) {
        const int64_t pixel = phases == 2 ? factorized_source(t, row, column, phase)
                                          : row * width + column;
        if (pixel < 0) continue;
        parts.each([&](int64_t channel, int64_t offset) PDARTS_LAMBDA {
          const T* x = image + offset + pixel * t.x_stride;
          float* o = w.raw + pixel * cx + channel;
          for (int64_t c = 0; c < parts.channels; c += V)
            store(o + c, load(o + c) + masked(load(a + channel + c), load(x + c)));
        });
      }
  gathered_weights(t, b, packed, group, n, image, begin, end, w);
}

// Image n where one product is all there is, as in front of a cell, or two of the same x: no sum to keep but
// what comes in. Of patches the weight gradient alone.
template <class T>
void pointwise_image(const Task& t, const Packed<T>* packed, int64_t group, int64_t n,
                     const T* image, const Work& w) {
  const int64_t width = t.out_width, rows = rows_per_chunk(t), cx = t.in_channels;
  const int64_t dy_step = operand_floats(chunk_pixels(t), t.channels);
  const bool two = t.num_branches == 2;
  const Parts parts = Parts::of(t);
  for (int64_t begin = 0; begin < t.out_height; begin += rows) {
    const int64_t end = min_of(t.out_height, begin + rows), pixels = (end - begin) * width;
    const int64_t first = n * t.out_height * width + begin * width;
    for (int64_t i = 0; i < t.num_branches; ++i) {
      Operand<T>* dy = operands<T>(w.dy + i * dy_step);
      output_gradient<T>(t, t.branches[i], first, pixels, dy);
      if (t.out)
        product_rows(dy, t.channels, pixels, t.channels, packed[i].pointwise, cx, i ? w.second : w.a,
                     NothingAhead{});
    }
    if (t.out) {
      const GradientAhead next = gradient_ahead<T>(t, t.branches[0], first + pixels);
      const GradientAhead second = gradient_ahead<T>(t, t.branches[t.num_branches - 1], first + pixels);
      parts.each([&](int64_t channel, int64_t offset) {
        const T* x = image + offset + begin * width * t.x_stride;
        const T* incoming = static_cast<const T*>(t.incoming);
        if (incoming) incoming += offset + first * t.incoming_stride;
        const Ahead next_x = Ahead::of(x + pixels * t.x_stride, t.x_stride);
        write_rows(pixels, parts.channels, static_cast<T*>(t.out) + offset + first * t.out_stride,
                   t.out_stride, !incoming, [&](int64_t p, int64_t c) PDARTS_LAMBDA {
                     const int64_t from = p * cx + channel + c;
                     next_x.ask(p, c / V);
                     if (channel + c < t.channels) {
                       next.ask(p, (channel + c) / V);
                       if (two) second.ask(p, (channel + c) / V);
                     }
                     const Vec by = load(x + p * t.x_stride + c);
                     Vec dx = masked(load(w.a + from), by);
                     // As if they had been stored and added.
                     if (incoming || two) dx = as_stored<T>(dx);
                     if (two) dx += as_stored<T>(masked(load(w.second + from), by));
                     return incoming ? dx + load(incoming + p * t.incoming_stride + c) : dx;
                   });
      });
    }
    if (!packed[0].grad_pointwise) continue;
    Operand<T>* a = operands<T>(w.a);
    const int64_t depth = product_depth(t, t.branches[0]);
    gather(t, t.branches[0], image, begin, end, a);
    const auto* right = right_side(a, pixels, depth);
    for (int64_t i = 0; i < t.num_branches; ++i)
      outer(left_side(operands<T>(w.dy + i * dy_step), pixels, t.channels), t.channels, right, depth, pixels,
            group_pointwise(t, t.branches[i], packed[i], group), begins_group(t, group, n, begin));
  }
}

// y [out pixels, C] of a pool of an image.
template <class T>
const T* pool_output(const Task& t, const Branch& b, int64_t n, const T* image, const Work& w) {
  if (!is_recomputed(b))
    return static_cast<const T*>(b.y) + n * t.out_height * t.out_width * t.channels;
  T* y = reinterpret_cast<T*>(w.fresh);
  store_pool(t, b, image, 0, t.out_height, y);
  return y;
}

// w.pooled = sum of dy over all pools of one kind. They share their y, so it is read once. Returns
// the first of them, with the y of its image, null if there is none.
template <class T>
const Branch* pooled_gradient(const Task& t, int64_t kind, int64_t n, const T* image,
                              const Work& w, const T*& y) {
  const int64_t pixels = t.out_height * t.out_width, channels = t.channels;
  const Branch* first = nullptr;
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    if (b.kind != kind) continue;
    if (first) {
      add_scaled_gradient<T>(t, b, n * pixels, pixels, w.pooled);
      continue;
    }
    first = &b;
    y = pool_output(t, b, n, image, w);
    float* coef = w.a;
    std::memcpy(coef, b.coef, static_cast<size_t>(3 * channels) * sizeof(float));
    for (int64_t j = i + 1; j < t.num_branches; ++j)
      if (t.branches[j].kind == kind)
        for (int64_t c = channels; c < 3 * channels; ++c) coef[c] += t.branches[j].coef[c];
    Branch together = b;
    together.coef = coef;
    together.y = const_cast<T*>(y);
    together.grad = static_cast<const T*>(b.grad) + n * pixels * b.grad_stride;
    output_gradient<T>(t, together, 0, pixels, w.pooled);
  }
  return first;
}

// Adds all pools of one kind to w.raw: their gradients are summed first, one backward serves all.
template <class T>
void pools_backward(const Task& t, int64_t kind, int64_t n, const T* image, const Work& w) {
  const T* y = nullptr;
  const Branch* b = pooled_gradient(t, kind, n, image, w, y);
  if (b) pool_backward(t, *b, image, y, w.pooled, w.a, w.raw);
}

// Adds scale * grad * factor(pixel, channel) of a skip to w.raw.
template <class T, class Factor>
PDARTS_INLINE void add_skip(const Task& t, const Branch& b, int64_t n, const Work& w,
                            Factor factor) {
  const int64_t pixels = t.out_height * t.out_width, channels = t.channels;
  const T* g = static_cast<const T*>(b.grad) + n * pixels * b.grad_stride;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += V) {
      float* o = w.raw + p * channels + c;
      const Vec grad = load(b.scale + c) * load(g + p * b.grad_stride + c);
      store(o, load(o) + grad * factor(p, c));
    }
}

// Adds scale * dropout(grad) of a skip to w.raw.
template <class T>
void skip_backward(const Task& t, const Branch& b, int64_t n, const Work& w) {
  const int64_t pixels = t.out_height * t.out_width, channels = t.channels;
  const int64_t real = t.real_channels, first = n * pixels;
  if (b.mask) {
    const uint8_t* drawn = b.mask + first * channels;
    add_skip<T>(t, b, n, w,
                [&](int64_t p, int64_t c) { return load_mask(drawn + p * channels + c); });
  } else if (b.kept) {
    const Vec kept = kept_factor(t);
    add_skip<T>(t, b, n, w, [&](int64_t p, int64_t c) {
      return load_kept(b.kept, (first + p) * channels + c, kept);
    });
  } else if (b.stream >= 0) {
    const float* keep = dropout_factors(t, b, first * real, pixels * real, w.factors);
    add_skip<T>(t, b, n, w, [&](int64_t p, int64_t c) { return load(keep + p * real + c); });
  } else {
    add_skip<T>(t, b, n, w, [&](int64_t, int64_t) { return broadcast(1.0f); });
  }
}

// out = incoming + raw + (x > 0) * dx of image n; total [2, Cx] += its sums unless that is null.
template <class T>
void write_image(const Task& t, const Sizes& s, int64_t n, const T* image, const Work& w, double* total) {
  const int64_t pixels = t.in_height * t.in_width, cx = t.in_channels;
  const Parts parts = Parts::of(t);
  const T* incoming = static_cast<const T*>(t.incoming);
  if (incoming) incoming += n * pixels * t.incoming_stride;
  std::memset(w.sums, 0, static_cast<size_t>(s.sums) * sizeof(float));
  for (int64_t row = 0; row < t.in_height; ++row) {
    const int64_t first = row * t.in_width;
    T* out = static_cast<T*>(t.out) + (n * pixels + first) * t.out_stride;
    parts.each([&](int64_t channel, int64_t offset) {
      write_rows(t.in_width, parts.channels, out + offset, t.out_stride, kWholeLines<T>,
                 [&](int64_t column, int64_t in_part) PDARTS_LAMBDA {
                   const int64_t p = first + column, c = channel + in_part;
                   const T* x = image + offset + p * t.x_stride + in_part;
                   Vec v = s.raw ? load(w.raw + p * cx + c) : Vec{};
                   if (s.conv) v += masked(load(w.dx.at(c / V, row, column)), load(x));
                   if (incoming) v += load(incoming + offset + p * t.incoming_stride + in_part);
                   if (total) {
                     const Vec out = as_stored<T>(v);
                     float* sum = w.sums + column % kSumChains * 2 * cx + c;
                     store(sum, load(sum) + out);
                     store(sum + cx, load(sum + cx) + out * load(x));
                   }
                   return v;
                 });
    });
  }
  if (!total) return;
  for (int64_t chain = 0; chain < kSumChains; ++chain) add_sums(total, w.sums + chain * 2 * cx, 2 * cx);
}

// The convolution after branch i of image n, or the first one of the image after.
Next next_convolution(const Task& t, int64_t group, int64_t i, int64_t n) {
  for (int64_t next = i + 1; next < t.num_branches; ++next)
    if (t.branches[next].kind == kConv) return {t.branches[next], n};
  int64_t first = 0;
  while (t.branches[first].kind != kConv) ++first;
  return {t.branches[first], image_after(t, group, n)};
}

template <class T>
void image_backward(const Task& t, const Sizes& s, const Packed<T>* packed, int64_t group,
                    int64_t n, const Work& w, double* total) {
  const T* image = static_cast<const T*>(t.x) + n * t.in_height * t.in_width * t.x_stride;
  if (s.lone) return pointwise_image(t, packed, group, n, image, w);
  const auto input = [&](int64_t p, int64_t block) PDARTS_LAMBDA {
    return relu(load(image + p * t.x_stride + block * V));
  };
#ifdef PDARTS_AMX
  if (s.dense && s.weights)
    w.input.each([&](const PairedRows* early, const PairedRows* late) {
      fill_in_turns(*early, *late, [&](int64_t p) PDARTS_LAMBDA { return input(p, 0); });
    });
#endif
  if (s.conv) {
    if (!s.dense) fill(w.x, t.channels / V, input);
    if (s.strided) std::memset(w.dx.data, 0, static_cast<size_t>(s.x) * sizeof(float));
  }
  bool begins = !s.strided;
  std::memset(w.raw, 0, static_cast<size_t>(s.raw) * sizeof(float));
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    if (b.kind == kConv) {
      conv_backward<T>(t, s, b, packed[i], group, n, next_convolution(t, group, i, n), w, begins);
      begins = false;
    }
    if (b.kind == kSkip) skip_backward<T>(t, b, n, w);
    if (b.kind != kPointwise && b.kind != kFactorized) continue;
    const int64_t rows = rows_per_chunk(t);
    for (int64_t begin = 0; begin < t.out_height; begin += rows)
      gathered_backward(t, b, packed[i], group, n, image, begin,
                        min_of(t.out_height, begin + rows), w);
  }
  pools_backward(t, kMaxPool, n, image, w);
  pools_backward(t, kAvgPool, n, image, w);
  if (t.out) write_image(t, s, n, image, w, total);
}

template <class T>
void run(const Task& t) {
  const auto* packed = prepare_backward<Operand<T>>(t, shared_scratch);
  const Sizes sizes = sizes_of<T>(t);
  const int64_t columns = t.sums ? 2 * t.in_channels : 0;
  sums_scratch.reset(Scratch::bytes_for<double>(t.groups * columns));
  double* partial = sums_scratch.take<double>(t.groups * columns);
  if (t.sums) std::memset(partial, 0, static_cast<size_t>(t.groups * columns) * sizeof(double));
  parallel(t.threads, [&](Member& member) {
    [[maybe_unused]] Tiles tiles;
    const Work work = make_work<T>(t, sizes, local_scratch);
    pack_backward(t, packed, member);
    each(member, t.groups, 1, [&](int64_t group) {
      const Range range = group_range(t, group);
      double* total = t.sums ? partial + group * columns : nullptr;
      for (int64_t n = range.begin; n < range.end; ++n)
        image_backward<T>(t, sizes, packed, group, n, work, total);
    });
    end_streams();
    finish_backward(t, packed, member);
  });
  if (t.sums) sum_groups(partial, t.groups, columns, columns, t.sums);
}

}  // namespace

void fan_in(const Task& t) {
  t.bf16 ? run<BFloat>(t) : PDARTS_FLOAT(fan_in, run<float>(t));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
