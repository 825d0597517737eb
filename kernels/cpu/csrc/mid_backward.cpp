// mid_backward: the second half of separable convolutions, v = relu(input * scale + shift).
//   dy = coef[0] * grad + coef[1] * y + coef[2]
//   dz = dy W,  dv = (v > 0) * depthwise^T(dz)          -> grad_input
//   dW = dy^T z with z = depthwise(v) recomputed        -> grad_pointwise
//   weights of the depthwise                            -> grad_depthwise
//   sums[0] = sum of dv, sums[1] = sum of dv * v: the batch means of the first half's BatchNorm
//   backward, because v is its normalised output wherever dv is not zero.
#include "backward.h"
#include "primitives.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch shared_scratch, sums_scratch, local_scratch;

// From the gradient `a` [(end - begin) * width, C] of v, before the mask of the ReLU, to dv of output rows
// [begin, end) of image n, its sums into `total` [2, C]. v(channel block)(pixel of the image) is v; `room`
// holds a chunk. Sums are of what is stored, so that means cancel exactly in the first half.
#ifdef PDARTS_BF16
template <class T, class Forward>
PDARTS_INLINE void input_gradient(const Task& t, const Branch& b, int64_t n, int64_t begin, int64_t end,
                                  Forward v, const float* a, float*, double* total) {
  const int64_t channels = t.channels, first_pixel = begin * t.out_width;
  T* out = static_cast<T*>(b.grad_input) + (n * t.out_height * t.out_width + first_pixel) * channels;
  const bool past = can_stream_lines(out, channels);
  each_line((end - begin) * t.out_width, channels, [&](const Lines& lines, auto vectors) PDARTS_LAMBDA {
    constexpr int N = vectors.value;
    decltype(v(0)) of[N];
    PDARTS_UNROLL
    for (int j = 0; j < N; ++j) of[j] = v(lines.channel_of(j) / V);
    Vec sum[kLineChains][N] = {}, product[kLineChains][N] = {};
    const auto add = [&](int64_t i, int chain) PDARTS_LAMBDA {
      const int64_t at = lines.pixel_of(i, 0) * channels + lines.channel;
      Vec forward[N], dv[N];
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) {
        forward[j] = of[j](first_pixel + lines.pixel_of(i, j));
        dv[j] = masked(load(a + at + j * V), forward[j]);
      }
      round_lines(dv, out + at, past);
      PDARTS_UNROLL
      for (int j = 0; j < N; ++j) {
        sum[chain][j] += dv[j];
        product[chain][j] += dv[j] * forward[j];
      }
    };
    in_chains<kLineChains>(lines.count, add);
    PDARTS_UNROLL
    for (int j = 0; j < N; ++j) {
      float chunk[2][V];
      store(chunk[0], sum[0][j] + sum[1][j]);
      store(chunk[1], product[0][j] + product[1][j]);
      add_sums(total + lines.channel_of(j), chunk[0], V);
      add_sums(total + channels + lines.channel_of(j), chunk[1], V);
    }
  });
}
#else
template <class T, class Forward>
PDARTS_INLINE void input_gradient(const Task& t, const Branch& b, int64_t n, int64_t begin, int64_t end,
                                  Forward v, const float* a, float* room, double* total) {
  const int64_t channels = t.channels, blocks = channels / V, first = begin * t.out_width;
  const int64_t pixels = (end - begin) * t.out_width;
  T* out = static_cast<T*>(b.grad_input) + (n * t.out_height * t.out_width + first) * channels;
  T* fresh = reinterpret_cast<T*>(room);
  const bool past = kWholeLines<T> && can_stream(out);
  for (int64_t block = 0; block < blocks; ++block) {
    constexpr int kChains = 4;
    const auto of_block = v(block);
    Vec sum[kChains] = {}, product[kChains] = {};
    const auto add = [&](int64_t p, int chain) PDARTS_LAMBDA {
      const int64_t at = p * channels + block * V;
      const Vec forward = of_block(first + p);
      const Vec dv = as_stored<T>(masked(load(a + at), forward));
      past ? stream(out + at, dv) : store(fresh + at, dv);
      sum[chain] += dv;
      product[chain] += dv * forward;
    };
    in_chains<kChains>(pixels, add);
    float chunk[2][V];
    store(chunk[0], (sum[0] + sum[1]) + (sum[2] + sum[3]));
    store(chunk[1], (product[0] + product[1]) + (product[2] + product[3]));
    add_sums(total + block * V, chunk[0], V);
    add_sums(total + channels + block * V, chunk[1], V);
  }
  if (!past) write_out(out, fresh, pixels * channels);
}
#endif

// A channel block of v from its plane.
struct PlaneInput {
  const float* block;
  const int32_t* places;

  PDARTS_INLINE_METHOD Vec operator()(int64_t p) const { return load(block + places[p]); }
};

// What a thread works with: an image of a branch.
struct Work {
  Plane v, grad;
  int32_t* places;  // of every pixel in a channel block of both
  float *dy, *a;    // a chunk each
  bool is_dense;  // see dense.h
#ifdef PDARTS_AMX
  DensePlanes input;
  DenseGradients dense;
  float* sums;  // two rows
#endif
};

template <class T>
Work make_work(const Task& t, Scratch& local) {
  Work w{};
  const int64_t pixels = t.out_height * t.out_width, chunk = operand_floats(chunk_pixels(t), t.channels);
  w.is_dense = is_dense<T>(t);
#ifdef PDARTS_AMX
  if (w.is_dense) {
    local.reset(DensePlanes::bytes(t) + DenseGradients::bytes(t) +
                Scratch::bytes_for<float>(pair_numbers(t)));
    w.input = DensePlanes::make(t, local, true);
    w.dense = DenseGradients::make(t, local);
    w.sums = local.take<float>(pair_numbers(t));
    return w;
  }
#endif
  const int64_t blocks = t.channels / V, padding = widest_padding(t);
  const int64_t plane = Plane::floats(t.out_height, t.out_width, padding, blocks);
  local.reset(2 * Scratch::bytes_for<float>(plane) + 2 * Scratch::bytes_for<float>(chunk) +
              Scratch::bytes_for<int32_t>(pixels));
  w.v = Plane::make(local, t.out_height, t.out_width, padding, blocks);
  w.grad = Plane::make(local, t.out_height, t.out_width, padding, blocks);
  w.places = local.take<int32_t>(pixels);
  pixel_places(w.grad, w.places);
  w.dy = local.take<float>(chunk);
  w.a = local.take<float>(chunk);
  return w;
}

template <class T>
void image_backward(const Task& t, const Branch& b, const Packed<T>& packed, int64_t group, int64_t n,
                    const Next& next, const Work& w, double* total) {
  const int64_t channels = t.channels, width = t.out_width, rows = rows_per_chunk(t);
  const int64_t pixels = t.out_height * width;
  const T* in = static_cast<const T*>(b.input) + n * pixels * b.input_stride;
  const auto forward = [&](int64_t block) PDARTS_LAMBDA { return NormalisedInput<T>::of(in, b, block); };
  const Branch& following = next.branch;
  const Ahead ahead = Ahead::of(static_cast<const T*>(following.input) +
                                    next.image * pixels * following.input_stride,
                                following.input_stride);
#ifdef PDARTS_AMX
  if constexpr (std::is_same<T, BFloat>::value)
    if (w.is_dense) {
      const PairedRows* planes = w.input.all[b.dilation - 1];
      const PairedRows& plane = w.dense.planes.of(b);
      const GradientAhead gradient = next_ahead<T>(t, next);
      WholeTiles whole;
      Aheads asked;
      asked.add(ahead);
      asked.add(gradient.first);
      if (packed.grad_pointwise)
        fill_in_turns(planes[0], planes[1], w.input.rows, forward(0));
      else
        asked.add(gradient.second);
      dense_gradients(t, b, packed, group, n, w.input, w.dense, gradient.second);
      each_pair(plane, [&](const RowPair& pair) PDARTS_LAMBDA {
        const int64_t tiled = tiled_width(width) * V;
        dense_rows(b, plane, packed.dense, pair, w.sums, w.sums + tiled, false, asked);
        each_chunk(plane, pair, [&](int64_t row, int64_t count, int64_t place) PDARTS_LAMBDA {
          input_gradient<T>(t, b, n, row, row + count, forward, w.sums + place, w.dy, total);
        });
      });
      return;
    }
#endif
  fill(w.v, channels / V, forward);
  for (int64_t begin = 0; begin < t.out_height; begin += rows)
    pointwise_backward<T>(t, b, packed, group, n, begin, min_of(t.out_height, begin + rows), next, w.v,
                          w.grad, w.places, operands<T>(w.dy), operands<T>(w.a));
  const Ahead gradient = next_ahead<T>(t, next).first;
  for (int64_t begin = 0; begin < t.out_height; begin += rows) {
    const int64_t end = min_of(t.out_height, begin + rows);
    // The stride of a second half is 1, so its transposed convolution is one with turned kernels.
    Aheads asked = Aheads::of(ahead.from(begin * width));
    if (kAskInStencils) asked.add(gradient.from(begin * width));
    depthwise_chunk(b, w.grad, packed.flipped, channels, begin, end, width, asked, w.a);
    input_gradient<T>(t, b, n, begin, end,
                      [&](int64_t block) PDARTS_LAMBDA {
                        return PlaneInput{w.v.data + block * w.v.plane, w.places};
                      },
                      w.a, w.dy, total);
  }
  weights_backward(t, b, packed, group, n, w.v, w.grad);
}

// What follows branch i of image n: the next one, or the first one of another image.
Next next_branch(const Task& t, int64_t group, int64_t i, int64_t n) {
  if (i + 1 < t.num_branches) return {t.branches[i + 1], n};
  return {t.branches[0], image_after(t, group, n)};
}

template <class T>
void run(const Task& t) {
  const auto* packed = prepare_backward<Operand<T>>(t, shared_scratch);
  const int64_t channels = t.channels, columns = t.num_branches * 2 * channels;
  sums_scratch.reset(Scratch::bytes_for<double>(t.groups * columns));
  double* partial = sums_scratch.take<double>(t.groups * columns);
  std::memset(partial, 0, static_cast<size_t>(t.groups * columns) * sizeof(double));
  parallel(t.threads, [&](Member& member) {
    [[maybe_unused]] Tiles tiles;
    const Work work = make_work<T>(t, local_scratch);
    pack_backward(t, packed, member);
    each(member, t.groups, 1, [&](int64_t group) {
      const Range range = group_range(t, group);
      for (int64_t n = range.begin; n < range.end; ++n)
        for (int64_t i = 0; i < t.num_branches; ++i)
          image_backward<T>(t, t.branches[i], packed[i], group, n, next_branch(t, group, i, n), work,
                            partial + group * columns + i * 2 * channels);
    });
    end_streams();
    finish_backward(t, packed, member);
  });
  for (int64_t i = 0; i < t.num_branches; ++i)
    sum_groups(partial + i * 2 * channels, t.groups, columns, 2 * channels, t.branches[i].sums);
}

}  // namespace

void mid_backward(const Task& t) {
  t.bf16 ? run<BFloat>(t) : PDARTS_FLOAT(mid_backward, run<float>(t));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
