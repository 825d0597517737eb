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

// dv of output rows [begin, end) of image n, its sums into `total` [2, C]. `a` and `room` hold a chunk;
// `ahead` is what the next branch reads first.
template <class T>
void input_gradient(const Task& t, const Branch& b, const Packed<T>& packed,
                    int64_t n,
                    int64_t begin, int64_t end, const Ahead& ahead, const Plane& v,
                    const Plane& grad, float* a, float* room, double* total) {
  const int64_t channels = t.channels, width = t.out_width, blocks = channels / V;
  T* out = static_cast<T*>(b.grad_input) + (n * t.out_height + begin) * width * channels;
  T* fresh = reinterpret_cast<T*>(room);
  // The stride of a second half is 1, so its transposed convolution is one with turned kernels.
  depthwise_chunk(b, grad, packed.flipped, channels, begin, end, width, a);
  const bool past = kWholeLines<T> && can_stream(out);
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t at = block * V;
    // Pixels alternate between chains of sums: a chain waits for its last addition.
    constexpr int kChains = 4;
    Vec sum[kChains] = {}, product[kChains] = {};
    const auto add = [&](int64_t row, int64_t column, int chain) {
      const Vec forward = load(v.at(block, row, column));
      ahead.ask(row * width + column, block);
      // Sums are of what is stored, so that means cancel exactly in the first half.
      const Vec dv = as_stored<T>(masked(load(a + at), forward));
      past ? stream(out + at, dv) : store(fresh + at, dv);
      sum[chain] += dv;
      product[chain] += dv * forward;
      at += channels;
    };
    for (int64_t row = begin; row < end; ++row) {
      int64_t column = 0;
      for (; column + kChains <= width; column += kChains) {
        PDARTS_UNROLL
        for (int i = 0; i < kChains; ++i) add(row, column + i, i);
      }
      for (; column < width; ++column) add(row, column, 0);
    }
    float chunk[2][V];
    store(chunk[0], (sum[0] + sum[1]) + (sum[2] + sum[3]));
    store(chunk[1], (product[0] + product[1]) + (product[2] + product[3]));
    add_sums(total + block * V, chunk[0], V);
    add_sums(total + channels + block * V, chunk[1], V);
  }
  if (!past) write_out(out, fresh, (end - begin) * width * channels);
}

template <class T>
void image_backward(const Task& t, const Branch& b, const Packed<T>& packed,
                    int64_t group,
                    int64_t n, const Next& next, const Plane& v, const Plane& grad,
                    const int32_t* places,
                    float* dy, float* a, double* total) {
  const int64_t pixels = t.out_height * t.out_width, rows = rows_per_chunk(t);
  const T* in = static_cast<const T*>(b.input) + n * pixels * b.input_stride;
  fill(v, t.channels / V, [&](int64_t p, int64_t block) {
    const Vec x = load(in + p * b.input_stride + block * V);
    return relu(x * load(b.scale + block * V) + load(b.shift + block * V));
  });
  for (int64_t begin = 0; begin < t.out_height; begin += rows)
    pointwise_backward<T>(t, b, packed, group, n, begin, min_of(t.out_height, begin + rows), next,
                          v, grad, places, operands<T>(dy), operands<T>(a));
  const Branch& following = next.branch;
  const Ahead ahead = Ahead::of(static_cast<const T*>(following.input) +
                                    next.image * pixels * following.input_stride,
                                following.input_stride);
  for (int64_t begin = 0; begin < t.out_height; begin += rows)
    input_gradient<T>(t, b, packed, n, begin, min_of(t.out_height, begin + rows), ahead, v, grad,
                      a, dy, total);
  weights_backward(t, b, packed, group, v, grad);
}

// What follows branch i of image n: the next one, or the first one of another image.
Next next_branch(const Task& t, int64_t group, int64_t i, int64_t n) {
  if (i + 1 < t.num_branches) return {t.branches[i + 1], n};
  return {t.branches[0], image_after(t, group, n)};
}

template <class T>
void run(const Task& t) {
  const auto* packed = prepare_backward<Operand<T>>(t, shared_scratch);
  const int64_t channels = t.channels, blocks = channels / V, padding = widest_padding(t);
  const int64_t columns = t.num_branches * 2 * channels;
  sums_scratch.reset(Scratch::bytes_for<double>(t.groups * columns));
  double* partial = sums_scratch.take<double>(t.groups * columns);
  std::memset(partial, 0, static_cast<size_t>(t.groups * columns) * sizeof(double));
  const int64_t plane_floats = Plane::floats(t.out_height, t.out_width, padding, blocks);
  const int64_t chunk_floats = operand_floats(chunk_pixels(t), channels);
  parallel(t.threads, [&](Member& member) {
    [[maybe_unused]] Tiles tiles;
    Scratch& local = local_scratch;
    local.reset(2 * Scratch::bytes_for<float>(plane_floats) +
                2 * Scratch::bytes_for<float>(chunk_floats) +
                Scratch::bytes_for<int32_t>(t.out_height * t.out_width));
    const Plane v = Plane::make(local, t.out_height, t.out_width, padding, blocks);
    const Plane grad = Plane::make(local, t.out_height, t.out_width, padding, blocks);
    int32_t* places = local.take<int32_t>(t.out_height * t.out_width);
    pixel_places(grad, places);
    float* dy = local.take<float>(chunk_floats);
    float* a = local.take<float>(chunk_floats);
    pack_backward(t, packed, member);
    each(member, t.groups, 1, [&](int64_t group) {
      begin_group(t, packed, group);
      const Range range = group_range(t, group);
      for (int64_t n = range.begin; n < range.end; ++n)
        for (int64_t i = 0; i < t.num_branches; ++i)
          image_backward<T>(t, t.branches[i], packed[i], group, n, next_branch(t, group, i, n), v,
                            grad, places, dy, a,
                            partial + group * columns + i * 2 * channels);
    });
    end_streams();
    finish_backward(t, packed, member);
  });
  for (int64_t i = 0; i < t.num_branches; ++i)
    for (int64_t c = 0; c < 2 * channels; ++c) {
      double sum = 0.0;
      for (int64_t g = 0; g < t.groups; ++g) sum += partial[g * columns + i * 2 * channels + c];
      t.branches[i].sums[c] = sum;
    }
}

}  // namespace

void mid_backward(const Task& t) {
  t.bf16 ? run<BFloat>(t) : PDARTS_FLOAT(mid_backward, run<float>(t));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
