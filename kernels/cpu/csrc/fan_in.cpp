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
  Aheads asked;
  if (kAskInStencils) asked.add(next_ahead<T>(t, next).first);
  add_transposed(b, w.grad, packed.depthwise, packed.flipped, t.channels / V, w.dx, begins, asked);
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
                     Vec of_second = two ? masked(load(w.second + from), by) : Vec{};
                     // As if they had been stored and added.
                     if (incoming || two) round_both<T>(dx, of_second);
                     if (two) dx += of_second;
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

// dx [in_width, C] += scale * grad * factor(pixel of the row, channel) of a skip, for pixels from `first` of the
// batch.
template <class T, class Factor>
PDARTS_INLINE void add_skip(const Task& t, const Branch& b, int64_t first, float* dx, Factor factor) {
  const int64_t channels = t.channels;
  const T* g = static_cast<const T*>(b.grad) + first * b.grad_stride;
  for (int64_t c = 0; c < channels; c += V) {
    const Vec scale = load(b.scale + c);
    for (int64_t p = 0; p < t.in_width; ++p) {
      float* o = dx + p * channels + c;
      store(o, load(o) + scale * load(g + p * b.grad_stride + c) * factor(p, c));
    }
  }
}

// dx [in_width, C] += scale * dropout(grad) of a skip, for pixels from `first` of the batch.
template <class T>
void skip_backward(const Task& t, const Branch& b, int64_t first, float* factors, float* dx) {
  const int64_t channels = t.channels, real = t.real_channels;
  if (b.mask) {
    const uint8_t* drawn = b.mask + first * channels;
    add_skip<T>(t, b, first, dx, [&](int64_t p, int64_t c) { return load_mask(drawn + p * channels + c); });
  } else if (b.kept) {
    const Vec kept = kept_factor(t);
    add_skip<T>(t, b, first, dx,
                [&](int64_t p, int64_t c) { return load_kept(b.kept, (first + p) * channels + c, kept); });
  } else if (b.stream >= 0) {
    const float* keep = dropout_factors(t, b, first * real, t.in_width * real, factors);
    add_skip<T>(t, b, first, dx, [&](int64_t p, int64_t c) { return load(keep + p * real + c); });
  } else {
    add_skip<T>(t, b, first, dx, [&](int64_t, int64_t) { return broadcast(1.0f); });
  }
}

// out = incoming + pools + skips + raw + (x > 0) * dx of image n, row by row; total [2, Cx] += its sums unless
// that is null.
template <class T>
void write_image(const Task& t, const Sizes& s, int64_t n, const T* image, const Work& w, double* total) {
  const int64_t pixels = t.in_height * t.in_width, cx = t.in_channels;
  const Parts parts = Parts::of(t);
  const T* incoming = static_cast<const T*>(t.incoming);
  if (incoming) incoming += n * pixels * t.incoming_stride;
  MaximumBackward<T> most(t, image, n, w.maximum);
  AverageBackward<T> mean(t, image, n, w.average);
  std::memset(w.sums, 0, static_cast<size_t>(s.sums) * sizeof(float));
  for (int64_t row = 0; row < t.in_height; ++row) {
    const int64_t first = row * t.in_width;
    float* raw = w.raw + (s.gathered ? first * cx : 0);
    if (!s.gathered)
      for (int64_t i = 0; i < s.raw; i += V) store(raw + i, Vec{});
    for (int64_t i = 0; i < t.num_branches; ++i)
      if (t.branches[i].kind == kSkip) skip_backward<T>(t, t.branches[i], n * pixels + first, w.factors, raw);
    most.add_row(row, raw);
    mean.add_row(row, raw);
    T* out = static_cast<T*>(t.out) + (n * pixels + first) * t.out_stride;
    parts.each([&](int64_t channel, int64_t offset) {
      // What is read in the loops, as what they write past the caches may be anything to a compiler.
      const int64_t x_stride = t.x_stride, incoming_stride = t.incoming_stride, plane = w.dx.plane;
      const T* x = image + offset + first * x_stride;
      const T* more = incoming ? incoming + offset + first * incoming_stride : nullptr;
      const float* from = s.raw ? raw + channel : nullptr;
      const float* dx = s.conv ? w.dx.at(channel / V, row, 0) : nullptr;
      float* sums = total ? w.sums + channel : nullptr;
      write_rows(t.in_width, parts.channels, out + offset, t.out_stride, kWholeLines<T>,
                 [=](int64_t p, int64_t c) PDARTS_LAMBDA {
                   Vec v = from ? load(from + p * cx + c) : Vec{};
                   if (dx) v += masked(load(dx + c / V * plane + p * V), load(x + p * x_stride + c));
                   if (more) v += load(more + p * incoming_stride + c);
                   return v;
                 },
                 [=](int64_t p, int64_t c, Vec out) PDARTS_LAMBDA {
                   if (!sums) return;
                   float* sum = sums + p % kSumChains * 2 * cx + c;
                   store(sum, load(sum) + out);
                   store(sum + cx, load(sum + cx) + out * load(x + p * x_stride + c));
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
  const auto input = [&](int64_t block)
                         PDARTS_LAMBDA { return RectifiedInput<T>::of(image, t.x_stride, block); };
#ifdef PDARTS_AMX
  if (s.dense && s.weights)
    w.input.each([&](const PairedRows* early, const PairedRows* late) {
      fill_in_turns(*early, *late, w.input.rows, input(0));
    });
#endif
  if (s.conv) {
    if (!s.dense) fill(w.x, t.channels / V, input);
    if (s.strided) std::memset(w.dx.data, 0, static_cast<size_t>(s.x) * sizeof(float));
  }
  bool begins = !s.strided;
  if (s.gathered) std::memset(w.raw, 0, static_cast<size_t>(s.raw) * sizeof(float));
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    if (b.kind == kConv) {
      conv_backward<T>(t, s, b, packed[i], group, n, next_convolution(t, group, i, n), w, begins);
      begins = false;
    }
    if (b.kind != kPointwise && b.kind != kFactorized) continue;
    const int64_t rows = rows_per_chunk(t);
    for (int64_t begin = 0; begin < t.out_height; begin += rows)
      gathered_backward(t, b, packed[i], group, n, image, begin,
                        min_of(t.out_height, begin + rows), w);
  }
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
