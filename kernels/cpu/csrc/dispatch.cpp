// The C interface of the library: which variants this processor runs, and calling one: a primitive,
// a whole pass of a cell, a draw of masks; and running statistics.
#include "cell.h"
#include "team.h"

#if defined(PDARTS_HAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pdarts {

#define PDARTS_DECLARE(name) \
  namespace name {           \
  extern const Variant table; \
  }

#ifdef PDARTS_HAS_AMX
PDARTS_DECLARE(amx)
#endif
#ifdef PDARTS_HAS_AVX512BF16
PDARTS_DECLARE(avx512bf16)
#endif
#ifdef PDARTS_HAS_AVX512
PDARTS_DECLARE(avx512)
#endif
#ifdef PDARTS_HAS_AVX2
PDARTS_DECLARE(avx2)
#endif
PDARTS_DECLARE(generic)

namespace {

constexpr int64_t kMostVariants = 5;

struct Entry {
  const Variant* variant;
  bool runs;
};

#ifdef PDARTS_HAS_AMX
// Whether the processor has tiles of bfloat16 and the kernel lets this process use them; Linux wants to
// be asked before the first use.
bool ask_for_tiles() {
#if defined(PDARTS_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBF16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return (d & kBF16) && (d & kTiles) && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

bool may_use_tiles() {
  static const bool may = ask_for_tiles();
  return may;
}
#endif

int64_t list(Entry* entries) {
  int64_t count = 0;
#if defined(PDARTS_HAS_AVX512) || defined(PDARTS_HAS_AVX2)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef PDARTS_HAS_AVX512
  const bool wide = fma && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
#ifdef PDARTS_HAS_AVX512BF16
  const bool pairs = wide && __builtin_cpu_supports("avx512bf16");
#ifdef PDARTS_HAS_AMX
  entries[count++] = {&amx::table, pairs && may_use_tiles()};
#endif
  entries[count++] = {&avx512bf16::table, pairs};
#endif
  entries[count++] = {&avx512::table, wide};
#endif
#ifdef PDARTS_HAS_AVX2
  entries[count++] = {&avx2::table, fma};
#endif
  entries[count++] = {&generic::table, true};
  return count;
}

}  // namespace
}  // namespace pdarts

extern "C" {

// Bumped whenever abi.h changes, so that a library of another version is refused.
int64_t pdarts_abi_version() { return 8; }

int64_t pdarts_sizeof_task() { return sizeof(pdarts::Task); }

int64_t pdarts_sizeof_branch() { return sizeof(pdarts::Branch); }

int64_t pdarts_sizeof_item() { return sizeof(pdarts::Item); }

int64_t pdarts_sizeof_cell() { return sizeof(pdarts::CellTask); }

int64_t pdarts_sizeof_running() { return sizeof(pdarts::RunningTask); }

int64_t pdarts_sizeof_draw() { return sizeof(pdarts::DrawTask); }

// Variant number `index`, best first: its name, or null past the last. Writes whether this
// processor runs it and how many floats its vectors have.
const char* pdarts_variant(int64_t index, int64_t* runs, int64_t* width) {
  pdarts::Entry entries[pdarts::kMostVariants];
  if (index < 0 || index >= pdarts::list(entries)) return nullptr;
  *runs = entries[index].runs;
  *width = entries[index].variant->width;
  return entries[index].variant->name;
}

// Runs a primitive of a variant. Returns 0, or 1 if there is no such primitive here.
int64_t pdarts_run(int64_t index, int64_t primitive, const pdarts::Task* task) {
  pdarts::Entry entries[pdarts::kMostVariants];
  if (index < 0 || index >= pdarts::list(entries) || !entries[index].runs) return 1;
  if (primitive < 0 || primitive >= pdarts::kNumPrimitives) return 1;
  entries[index].variant->primitives[primitive](*task);
  return 0;
}

// Runs a pass of cells that follow one another, forward or, from the last one on, backward. Returns like
// `pdarts_run`.
int64_t pdarts_run_cells(int64_t index, int64_t backward, const pdarts::CellTask* cells,
                         int64_t count) {
  pdarts::Entry entries[pdarts::kMostVariants];
  if (index < 0 || index >= pdarts::list(entries) || !entries[index].runs) return 1;
  struct Pass {
    const pdarts::Variant& variant;
    const pdarts::CellTask* cells;
    int64_t count, backward;
  } pass{*entries[index].variant, cells, count, backward};
  const auto run = [](void* data) {
    const Pass& p = *static_cast<Pass*>(data);
    (p.backward ? pdarts::cells_backward : pdarts::cells_forward)(p.cells, p.count, p.variant);
  };
  if (count > 0) pdarts::with_team(cells[0].threads, run, &pass);
  return 0;
}

// Draws masks. Returns like `pdarts_run`.
int64_t pdarts_draw(int64_t index, const pdarts::DrawTask* task) {
  pdarts::Entry entries[pdarts::kMostVariants];
  if (index < 0 || index >= pdarts::list(entries) || !entries[index].runs) return 1;
  entries[index].variant->draw(*task);
  return 0;
}

}  // extern "C"

namespace pdarts {
namespace {

// Hundreds of short vectors, which took longer one by one.
void move_running(const RunningTask& t) {
  const float momentum = static_cast<float>(t.momentum);
  for (int64_t i = 0; i < t.norms; ++i) {
    ++*t.batches[i];
    for (int64_t which = 0; which < 2; ++which) {
      const double* found = t.stats + (2 * t.slots[i] + which) * t.padded;
      const double factor = which ? t.unbiased[i] : 1.0;
      float* running = t.running[2 * i + which];
      for (int64_t c = 0; c < t.channels; ++c)
        running[c] += momentum * (static_cast<float>(found[c] * factor) - running[c]);
    }
  }
}

}  // namespace
}  // namespace pdarts

extern "C" {

// Moves running statistics of cells.
void pdarts_move_running(const pdarts::RunningTask* tasks, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pdarts::move_running(tasks[i]);
}

}  // extern "C"
