// fan_out: from one state x, the first output of every operation of every edge that leaves it. A state that
// is not normalised yet is as it is read.
//   y = W depthwise(relu(x)),  pools of x,  1x1 convolutions of relu(x),  a convolution of patches
// mid: the second half of separable convolutions, input v = relu(input * scale + shift).
//   y = W depthwise(v)
// Both write, into sums [2, C], mean and biased variance of every y. Backward: fan_in, mid.
#include "dense.h"
#include "gather.h"
#include "parallel.h"
#include "pooling.h"
#include "primitives.h"
#include "statistics.h"
#include "stencils.h"
#include "tiles.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

thread_local Scratch shared_scratch, local_scratch;

template <class E>
struct Packed {
  float* depthwise;
  E* pointwise;
  float* expanded;  // the pointwise weights before packing where they are not the parameter
  double* moments;  // [groups, 2, C]
  E* dense;         // see dense.h
  bool repeated;    // a pool that an earlier branch computes, too
};

int64_t depth_of(const Task& t, const Branch& b) {
  return b.kind == kConv ? t.channels : gather_depth(t, b);
}

bool has_product(const Branch& b) { return !is_pool(b.kind); }

// The first of the pools that are the same, of which one is computed, or branch i itself.
int64_t first_same(const Task& t, int64_t i) {
  const Branch& b = t.branches[i];
  if (!is_recomputed(b)) return i;
  int64_t first = 0;
  while (t.branches[first].kind != b.kind || t.branches[first].stride != b.stride) ++first;
  return first;
}

// Makes room for the partial statistics and the packed weights of every branch.
template <class E>
Packed<E>* prepare(const Task& t, Scratch& scratch) {
  Packed<E>* packed = scratch.take<Packed<E>>(t.num_branches);
  for (int64_t i = 0; i < t.num_branches; ++i) {
    const Branch& b = t.branches[i];
    Packed<E>& p = packed[i];
    p = Packed<E>{};
    const int64_t same = first_same(t, i);
    p.repeated = same < i;
    p.moments = p.repeated ? packed[same].moments : scratch.take<double>(t.groups * 2 * t.channels);
    if (!has_product(b)) continue;
    p.pointwise = scratch.take<E>(depth_of(t, b) * t.channels);
    if (b.kind == kFactorized) p.expanded = scratch.take<float>(depth_of(t, b) * t.channels);
    if (b.kind == kConv) p.depthwise = scratch.take<float>(t.channels * b.kernel * b.kernel);
    if (is_dense<E>(t)) p.dense = scratch.take<E>(dense_numbers(t, b));
  }
  return packed;
}

// Packs the weights of every branch: all threads call it and leave it together.
template <class E>
void pack(const Task& t, const Packed<E>* packed, Member& member) {
  each(member, t.num_branches, 1, [&](int64_t i) {
    const Branch& b = t.branches[i];
    const Packed<E>& p = packed[i];
    if (p.repeated) return;
    std::memset(p.moments, 0, static_cast<size_t>(t.groups * 2 * t.channels) * sizeof(double));
    if (!has_product(b)) return;
    const int64_t depth = depth_of(t, b);
    if (b.kind == kFactorized) expand_weights(t, b, p.expanded);
    pack_panels(b.kind == kFactorized ? p.expanded : b.pointwise, 1, depth, depth, t.channels,
                p.pointwise);
    if (b.kind == kConv)
      pack_depthwise(b.depthwise, t.channels, b.kernel * b.kernel, false, p.depthwise);
#ifdef PDARTS_AMX
    if constexpr (std::is_same<E, BFloat>::value)
      if (p.dense) pack_dense(b, p.depthwise, false, p.dense);
#endif
  });
  member.wait();
}

int64_t shared_bytes(const Task& t) {
  int64_t bytes = Scratch::bytes_for<Packed<float>>(t.num_branches);
  for (int64_t i = 0; i < t.num_branches; ++i)
    bytes += Scratch::bytes_for<BFloat>(dense_numbers(t, t.branches[i])) +
             Scratch::bytes_for<double>(t.groups * 2 * t.channels) +
             2 * Scratch::bytes_for<float>(depth_of(t, t.branches[i]) * t.channels) +
             Scratch::bytes_for<float>(t.channels * 25);
  return bytes;
}

// Padding that every convolution of the task finds around its input.
int64_t max_padding(const Task& t) {
  int64_t padding = 0;
  for (int64_t i = 0; i < t.num_branches; ++i)
    if (t.branches[i].kind == kConv && t.branches[i].padding > padding)
      padding = t.branches[i].padding;
  return padding;
}

int64_t max_depth(const Task& t) {
  int64_t depth = t.channels;
  for (int64_t i = 0; i < t.num_branches; ++i)
    if (has_product(t.branches[i]) && depth_of(t, t.branches[i]) > depth)
      depth = depth_of(t, t.branches[i]);
  return depth;
}

// What is read after a 1x1 convolution's pixels: its next ones, shared among the blocks of y.
struct PixelsAhead {
  Ahead input;
  Parts parts;
  int64_t part_bytes, y_blocks;

  template <class T>
  static PixelsAhead of(const Task& t, const T* next) {
    const Parts parts = Parts::of(t);
    return {Ahead::of(next, t.x_stride), parts, parts.step * static_cast<int64_t>(sizeof(T)), t.channels / V};
  }

  PDARTS_INLINE_METHOD void ask(int64_t pixel, int64_t block) const {
    Ahead part = input;
    for (int64_t i = 0; i < parts.count; ++i, part.data += part_bytes)
      for (int64_t b = block; b * V < parts.channels; b += y_blocks) part.ask(pixel, b);
  }
};

// Numbers of a chunk that `finish_chunk` reads: it rounds whole lines of bfloat16 at a time.
#ifdef PDARTS_BF16
template <class T>
using Fresh = float;
#else
template <class T>
using Fresh = T;
#endif

// Output rows [begin, end) of one image of one branch; `room` is for the chunk's matrix or the lines
// of a pool, `fresh` for its outputs while they are in cache. `ahead` is the image that is read next.
template <class T>
void branch_rows(const Task& t, const Branch& b, const Packed<Operand<T>>& packed,
                 const Plane& plane, const T* image, const Ahead& ahead, int64_t begin,
                 int64_t end, float* room, Fresh<T>* fresh, T* y, Moments& moments) {
  const int64_t channels = t.channels, width = t.out_width;
  const int64_t pixels = (end - begin) * width;
  if (y) y += begin * width * channels;
  if (!has_product(b)) {
    store_pool(t, b, image, begin, end, fresh);
    return finish_chunk(moments, fresh, pixels, channels, y);
  }
  const int64_t depth = depth_of(t, b);
  Operand<T>* a = operands<T>(room);
  const auto multiply = [&](const auto& asked) PDARTS_LAMBDA {
    product_rows(a, depth, pixels, depth, packed.pointwise, channels, fresh, asked);
  };
  const Ahead next = ahead.from(begin * width);
  if (b.kind == kConv) {
    depthwise_chunk(b, plane, packed.depthwise, channels, begin, end, width,
                    kAskInStencils ? Aheads::of(next) : Aheads{}, a);
    multiply(ahead_if<!kAskInStencils>(next));
  } else {
    gather(t, b, image, begin, end, a);
    if (b.kind == kPointwise) multiply(PixelsAhead::of(t, image + end * width * t.x_stride));
    else multiply(next);
  }
  finish_chunk(moments, fresh, pixels, channels, y);
}

#ifdef PDARTS_AMX
// The same for an image of a dense convolution; `sums` is a pair of rows.
void dense_branch(const Task& t, const Branch& b, const Packed<BFloat>& packed, const DensePlanes& planes,
                  const Ahead& ahead, int64_t n, float* sums, Moments& moments) {
  const int64_t width = t.out_width, tiled = tiled_width(width) * V;
  const PairedRows& plane = planes.of(b);
  BFloat* y = b.y ? static_cast<BFloat*>(b.y) + n * t.out_height * width * V : nullptr;
  const auto out = [&](int64_t row) { return y ? y + row * width * V : nullptr; };
  Aheads asked;
  asked.add(ahead);
  WholeTiles whole;
  each_pair(plane, [&](const RowPair& pair) {
    dense_rows(b, plane, packed.dense, pair, sums, sums + tiled, false, asked);
    each_chunk(plane, pair, [&](int64_t row, int64_t count, int64_t place) PDARTS_LAMBDA {
      finish_chunk(moments, sums + place, count * width, V, out(row));
    });
  });
}
#endif

template <class T>
void branch_image(const Task& t, const Branch& b, const Packed<Operand<T>>& packed,
                  const Plane& plane, const T* image, const Ahead& ahead, int64_t n, float* room,
                  Fresh<T>* fresh, Moments& moments) {
  const int64_t rows = rows_per_chunk(t);
  T* y = b.y ? static_cast<T*>(b.y) + n * t.out_height * t.out_width * t.channels : nullptr;
  for (int64_t begin = 0; begin < t.out_height; begin += rows)
    branch_rows(t, b, packed, plane, image, ahead, begin, min_of(t.out_height, begin + rows),
                room, fresh, y, moments);
}

// mean and biased variance of every branch from the groups' partial ones: all threads call it.
template <class E>
void finish(const Task& t, const Packed<E>* packed, Member& member) {
  const double pixels = static_cast<double>(t.out_height * t.out_width);
  member.wait();
  each(member, t.num_branches, 1, [&](int64_t i) {
    double* sums = t.branches[i].sums;
    Moments total{0.0, sums, sums + t.channels};
    std::memset(sums, 0, static_cast<size_t>(2 * t.channels) * sizeof(double));
    for (int64_t g = 0; g < t.groups; ++g) {
      const Range range = group_range(t, g);
      const double* part = packed[i].moments + g * 2 * t.channels;
      merge(total, static_cast<double>(range.end - range.begin) * pixels, part,
            part + t.channels, t.channels);
    }
    for (int64_t c = 0; c < t.channels; ++c) total.squares[c] /= total.count;
  });
}

// What is read after branch i of image n: the next branch's input, or that of image `after`.
template <class T>
Ahead next_input(const Task& t, int64_t i, int64_t n, int64_t after, bool second) {
  if (!second)
    return Ahead::of(static_cast<const T*>(t.x) + after * t.in_height * t.in_width * t.x_stride,
                     t.x_stride);
  const bool last = i + 1 == t.num_branches;
  const Branch& next = t.branches[last ? 0 : i + 1];
  return Ahead::of(static_cast<const T*>(next.input) +
                       (last ? after : n) * t.out_height * t.out_width * next.input_stride,
                   next.input_stride);
}

// What a thread works with.
template <class T>
struct Work {
  Plane plane;
  float* room;
  Fresh<T>* fresh;
  bool is_dense;  // its convolutions are, see dense.h
#ifdef PDARTS_AMX
  DensePlanes dense;
  float* sums;
#endif
};

template <class T>
Work<T> make_work(const Task& t, int64_t height, int64_t width, Scratch& local) {
  const bool dense = is_dense<T>(t);
  bool plane = false;
  for (int64_t i = 0; i < t.num_branches; ++i) plane |= t.branches[i].kind == kConv && !dense;
  const int64_t blocks = t.channels / V, padding = max_padding(t);
  const int64_t plane_floats = plane ? Plane::floats(height, width, padding, blocks) : 0;
  const int64_t room_floats = operand_floats(chunk_pixels(t), max_depth(t));
  const int64_t fresh_numbers = operand_pixels(chunk_pixels(t)) * t.channels;
  int64_t bytes = Scratch::bytes_for<float>(plane_floats) + Scratch::bytes_for<float>(room_floats) +
                  Scratch::bytes_for<Fresh<T>>(fresh_numbers);
#ifdef PDARTS_AMX
  if (dense) bytes += DensePlanes::bytes(t) + Scratch::bytes_for<float>(pair_numbers(t));
#endif
  local.reset(bytes);
  Work<T> work{};
  work.is_dense = dense;
  if (plane) work.plane = Plane::make(local, height, width, padding, blocks);
  work.room = local.take<float>(room_floats);
  work.fresh = local.take<Fresh<T>>(fresh_numbers);
#ifdef PDARTS_AMX
  if (dense) {
    work.dense = DensePlanes::make(t, local, false);
    work.sums = local.take<float>(pair_numbers(t));
  }
#endif
  return work;
}

// What convolutions read of an image, f(channel block)(pixel): of one of them, or of all if it is null.
template <class T, class F>
PDARTS_INLINE void fill_input(const Task& t, const Work<T>& w, const Branch* b, F f) {
#ifdef PDARTS_AMX
  if (w.is_dense) {
    const auto pixel = f(0);
    if (b) {
      const PairedRows* one = &w.dense.of(*b);
      return fill_rows(t.out_height, t.out_width, one->late ? nullptr : one, one->late ? one : nullptr, pixel);
    }
    return w.dense.each([&](const PairedRows* early, const PairedRows* late) {
      fill_rows(t.out_height, t.out_width, early, late, pixel);
    });
  }
#endif
  if (w.plane.data) fill(w.plane, t.channels / V, f);
}

// Image n = image * scale + shift, in place.
template <class T>
PDARTS_SHARED void normalise(const Task& t, int64_t n) {
  const int64_t pixels = t.in_height * t.in_width, channels = t.in_channels;
  const int64_t stride = t.x_stride;
  const float *scale = t.scale, *shift = t.shift;
  T* image = static_cast<T*>(const_cast<void*>(t.x)) + n * pixels * stride;
  write_rows(pixels, channels, image, stride, false, [&](int64_t p, int64_t c) PDARTS_LAMBDA {
    return load(image + p * stride + c) * load(scale + c) + load(shift + c);
  });
}

// `second` is mid: every branch has an input of its own.
template <class T>
void run(const Task& t, bool second) {
  Scratch& shared = shared_scratch;
  shared.reset(shared_bytes(t));
  const auto* packed = prepare<Operand<T>>(t, shared);
  const int64_t height = second ? t.out_height : t.in_height;
  const int64_t width = second ? t.out_width : t.in_width;
  const int64_t pixels = height * width;
  parallel(t.threads, [&](Member& member) {
    [[maybe_unused]] Tiles tiles;
    const Work<T> work = make_work<T>(t, height, width, local_scratch);
    pack(t, packed, member);
    each(member, t.groups, 1, [&](int64_t g) {
      const Range range = group_range(t, g);
      for (int64_t n = range.begin; n < range.end; ++n) {
        const T* image = static_cast<const T*>(t.x) + n * pixels * t.x_stride;
        if (t.scale) normalise<T>(t, n);
        if (!second)
          fill_input(t, work, nullptr, [&](int64_t block) PDARTS_LAMBDA {
            return RectifiedInput<T>::of(image, t.x_stride, block);
          });
        for (int64_t i = 0; i < t.num_branches; ++i) {
          const Branch& b = t.branches[i];
          if (packed[i].repeated) continue;
          if (second) {
            const T* in = static_cast<const T*>(b.input) + n * pixels * b.input_stride;
            fill_input(t, work, &b, [&](int64_t block)
                                        PDARTS_LAMBDA { return NormalisedInput<T>::of(in, b, block); });
          }
          double* part = packed[i].moments + g * 2 * t.channels;
          const double before = static_cast<double>((n - range.begin) * t.out_height * t.out_width);
          Moments moments{before, part, part + t.channels};
          const Ahead ahead = next_input<T>(t, i, n, image_after(t, g, n), second);
#ifdef PDARTS_AMX
          if constexpr (std::is_same<T, BFloat>::value)
            if (b.kind == kConv && work.is_dense) {
              dense_branch(t, b, packed[i], work.dense, ahead, n, work.sums, moments);
              continue;
            }
#endif
          branch_image(t, b, packed[i], work.plane, image, ahead, n, work.room, work.fresh, moments);
        }
      }
    });
    end_streams();
    finish(t, packed, member);
  });
}

}  // namespace

void fan_out(const Task& t) {
  t.bf16 ? run<BFloat>(t, false) : PDARTS_FLOAT(fan_out, run<float>(t, false));
}

void mid(const Task& t) {
  t.bf16 ? run<BFloat>(t, true) : PDARTS_FLOAT(mid, run<float>(t, true));
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
