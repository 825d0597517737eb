// draw: masks of skip dropout as torch's generator on the CPU draws them, by the Mersenne twister
// MT19937 (Matsumoto and Nishimura 1998). An element takes two words, high then low; it is 1 if
// their lowest 53 bits are below the threshold. Elements are numbered as in [images, channels,
// pixels] and written channels-last.
//
// Words follow from one another, so one thread makes them; what becomes of them, image by image, is
// for all threads.
#include "primitives.h"
#include "scratch.h"

namespace pdarts {
namespace PDARTS_VARIANT {

namespace {

constexpr int64_t kBlock = 624, kDistance = 397;
// Words that stay when room is used again: the block that the recurrence reads, and the one before,
// where the generator's block may begin.
constexpr int64_t kKept = 2 * kBlock;
// Images a thread that words are made for before their room is used again.
constexpr int64_t kImagesAhead = 4;

typedef uint64_t Pairs __attribute__((vector_size(V * 4)));
typedef uint32_t UnalignedBits __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef uint8_t PairBytes __attribute__((vector_size(V / 2)));

thread_local Scratch shared_scratch, local_scratch;

PDARTS_INLINE Bits load_words(const uint32_t* p) {
  return *reinterpret_cast<const UnalignedBits*>(p);
}

// Words first .. end - 1 from those before them.
void make_words(uint32_t* words, int64_t first, int64_t end) {
  int64_t i = first - kBlock;
  // A word depends on none of the 226 before it.
  for (; i + V <= end - kBlock; i += V) {
    const Bits low = load_words(words + i + 1);
    const Bits y = (load_words(words + i) & 0x80000000u) | (low & 0x7fffffffu);
    const Bits next = load_words(words + i + kDistance) ^ (y >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
    *reinterpret_cast<UnalignedBits*>(words + i + kBlock) = next;
  }
  for (; i < end - kBlock; ++i) {
    const uint32_t low = words[i + 1], y = (words[i] & 0x80000000u) | (low & 0x7fffffffu);
    words[i + kBlock] = words[i + kDistance] ^ (y >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
  }
}

// V / 2 elements, 0 or 1, from V words.
PDARTS_INLINE void compare(const uint32_t* words, uint64_t threshold, uint8_t* kept) {
  Bits x = load_words(words);
  x ^= x >> 11;
  x ^= (x << 7) & 0x9d2c5680u;
  x ^= (x << 15) & 0xefc60000u;
  x ^= x >> 18;
  // Memory has the high word first.
  Pairs pairs = (Pairs)x;
  pairs = ((pairs << 32) | (pairs >> 32)) & ((uint64_t{1} << 53) - 1);
  const PairBytes bytes = __builtin_convertvector((pairs - threshold) >> 63, PairBytes);
  std::memcpy(kept, &bytes, sizeof bytes);
}

// kept [count] = 0 or 1 from 2 * count words; writes up to V / 2 beyond.
void compare_all(const uint32_t* words, int64_t count, uint64_t threshold, uint8_t* kept) {
  int64_t i = 0;
  for (; i + V / 2 <= count; i += V / 2) compare(words + 2 * i, threshold, kept + i);
  uint32_t last[V] = {};
  std::memcpy(last, words + 2 * i, static_cast<size_t>(2 * (count - i)) * sizeof(uint32_t));
  compare(last, threshold, kept + i);
}

// Swaps blocks of `bits` off the diagonal.
PDARTS_INLINE void swap_blocks(uint64_t& a, uint64_t& b, int bits, uint64_t mask) {
  const uint64_t changed = ((a >> bits) ^ b) & mask;
  b ^= changed;
  a ^= changed << bits;
}

// to [8, 8] = transposed from [8, 8], rows `from_stride` and `to_stride` bytes apart.
PDARTS_INLINE void transpose_8x8(const uint8_t* from, int64_t from_stride, uint8_t* to,
                                 int64_t to_stride) {
  uint64_t r[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&r[i], from + i * from_stride, 8);
  for (int i = 0; i < 4; ++i) swap_blocks(r[i], r[i + 4], 32, 0x00000000ffffffffu);
  for (int half = 0; half < 8; half += 4)
    for (int i = half; i < half + 2; ++i) swap_blocks(r[i], r[i + 2], 16, 0x0000ffff0000ffffu);
  for (int i = 0; i < 8; i += 2) swap_blocks(r[i], r[i + 1], 8, 0x00ff00ff00ff00ffu);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &r[i], 8);
}

// to [pixels, padded] = transposed kept [channels, pixels].
void transpose(const DrawTask& t, const uint8_t* kept, uint8_t* to) {
  if (t.padded > t.channels) std::memset(to, 0, static_cast<size_t>(t.pixels * t.padded));
  const int64_t whole_channels = t.channels / 8 * 8, whole_pixels = t.pixels / 8 * 8;
  for (int64_t p = 0; p < whole_pixels; p += 8)
    for (int64_t c = 0; c < whole_channels; c += 8)
      transpose_8x8(kept + c * t.pixels + p, t.pixels, to + p * t.padded + c, t.padded);
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t p = c < whole_channels ? whole_pixels : 0; p < t.pixels; ++p)
      to[p * t.padded + c] = kept[c * t.pixels + p];
}

// The stream of words, a stretch of which is in memory.
class Stream {
 public:
  // `room` is for kKept + `ahead` + kBlock words.
  Stream(const DrawTask& t, uint32_t* room) : room_(room), end_(kBlock), at_(*t.used) {
    std::memcpy(room_, t.words, kBlock * sizeof(uint32_t));
  }

  // The next `count` words.
  const uint32_t* take(int64_t count) {
    const uint32_t* taken = room_ + at_;
    at_ += count;
    reach(at_);
    return taken;
  }

  // Makes room; words taken before are gone.
  void rewind() {
    const int64_t gone = end_ - min_of(end_, kKept);
    std::memmove(room_, room_ + gone, static_cast<size_t>(end_ - gone) * sizeof(uint32_t));
    end_ -= gone;
    at_ -= gone;
    gone_ += gone;
  }

  // Leaves the generator behind the last word that was taken.
  void finish(const DrawTask& t) {
    const int64_t block = (gone_ + at_ - 1) / kBlock * kBlock - gone_;
    reach(block + kBlock);
    std::memcpy(t.words, room_ + block, kBlock * sizeof(uint32_t));
    *t.used = at_ - block;
  }

 private:
  void reach(int64_t end) {
    if (end > end_) make_words(room_, end_, end);
    end_ = max_of(end, end_);
  }

  uint32_t* room_;
  int64_t end_, at_, gone_ = 0;  // words in memory, of them taken, and before them
};

}  // namespace

void draw(const DrawTask& t) {
  const int64_t elements = t.channels * t.pixels, ahead = t.threads * kImagesAhead;
  const int64_t words = kKept + ahead * 2 * elements + kBlock;
  shared_scratch.reset(Scratch::bytes_for<uint32_t>(words));
  uint32_t* room = shared_scratch.take<uint32_t>(words);
#pragma omp parallel num_threads(static_cast<int>(t.threads))
#pragma omp single
  {
    Stream stream(t, room);
    for (int64_t i = 0; i < t.masks * t.images; ++i) {
      if (i % ahead == 0 && i > 0) {
#pragma omp taskwait
        stream.rewind();
      }
      const uint32_t* mine = stream.take(2 * elements);
#pragma omp task firstprivate(mine, i)
      {
        Scratch& local = local_scratch;
        local.reset(Scratch::bytes_for<uint8_t>(elements + V));
        uint8_t* kept = local.take<uint8_t>(elements + V);
        compare_all(mine, elements, t.thresholds[i / t.images], kept);
        transpose(t, kept, t.out + i * t.pixels * t.padded);
      }
    }
    stream.finish(t);
  }
}

}  // namespace PDARTS_VARIANT
}  // namespace pdarts
