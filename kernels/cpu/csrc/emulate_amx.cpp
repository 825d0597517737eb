// Executes the AMX instructions of tiles.h on a processor that has none, for tests: they raise SIGILL, and
// the handler does what the manual says (Intel SDM volume 2, "Intel AMX instruction set reference").
// Built into the library by `compile.py --emulate-amx` only. A microsecond an instruction.
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

namespace {

constexpr int kTiles = 8, kMostRows = 16, kRowBytes = 64;

struct TileState {
  uint8_t rows[kTiles];
  uint16_t row_bytes[kTiles];
  uint8_t data[kTiles][kMostRows][kRowBytes];
};

thread_local TileState state;

struct sigaction before;

std::atomic<int64_t> executed{0};

// A VEX-encoded instruction of opcode map 0F38 with a 128-bit prefix and W = 0.
struct Instruction {
  int prefix;  // 0 for none, else 0x66, 0xF3, 0xF2
  int opcode;
  bool memory;
  int reg, rm, vvvv;
  uint8_t* address;
  int64_t stride;
  int length;
};

int64_t register_value(const ucontext_t* context, int number) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kOrder[number]];
}

// Whether `code` is such an instruction.
bool decode(const uint8_t* code, const ucontext_t* context, Instruction& out) {
  constexpr int kPrefix[4] = {0, 0x66, 0xF3, 0xF2};
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return false;
  const int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;
  out.prefix = kPrefix[code[2] & 3];
  out.vvvv = ~code[2] >> 3 & 15;
  out.opcode = code[3];
  const int mod = code[4] >> 6;
  out.memory = mod != 3;
  out.reg = (code[4] >> 3 & 7) + 8 * r;
  out.rm = (code[4] & 7) + 8 * b;
  out.length = 5;
  if (!out.memory) return true;
  int64_t address = 0;
  out.stride = 0;
  bool has_base = true;
  int base = out.rm;
  if ((code[4] & 7) == 4) {
    const uint8_t sib = code[out.length++];
    const int index = (sib >> 3 & 7) + 8 * x;
    base = (sib & 7) + 8 * b;
    has_base = !(mod == 0 && (sib & 7) == 5);
    if (index != 4) out.stride = register_value(context, index) << (sib >> 6);
  } else if (mod == 0 && (code[4] & 7) == 5) {
    return false;  // relative to the instruction: compilers give tiles a base
  }
  if (has_base) address += register_value(context, base);
  if (mod == 1) {
    address += static_cast<int8_t>(code[out.length]);
    out.length += 1;
  } else if (mod == 2 || !has_base) {
    int32_t offset;
    std::memcpy(&offset, code + out.length, sizeof offset);
    address += offset;
    out.length += 4;
  }
  out.address = reinterpret_cast<uint8_t*>(address);
  return true;
}

void configure(const uint8_t* config) {
  state = TileState{};
  for (int i = 0; i < kTiles; ++i) {
    std::memcpy(&state.row_bytes[i], config + 16 + 2 * i, 2);
    state.rows[i] = config[48 + i];
  }
}

void load(int tile, const uint8_t* from, int64_t stride) {
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
  for (int row = 0; row < state.rows[tile]; ++row)
    std::memcpy(state.data[tile][row], from + row * stride, state.row_bytes[tile]);
}

void store(int tile, uint8_t* to, int64_t stride) {
  for (int row = 0; row < state.rows[tile]; ++row)
    std::memcpy(to + row * stride, state.data[tile][row], state.row_bytes[tile]);
}

float bfloat(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// tdpbf16ps sum, left, right. Even and odd terms are summed apart; subnormal numbers, which the processor
// takes for zero, are not.
bool multiply(int sum, int left, int right) {
  const int pairs = state.row_bytes[left] / 4, columns = state.row_bytes[sum] / 4;
  if (state.rows[sum] != state.rows[left] || state.rows[right] != pairs ||
      state.row_bytes[right] != state.row_bytes[sum])
    return false;
  for (int row = 0; row < state.rows[sum]; ++row)
    for (int column = 0; column < columns; ++column) {
      float even = 0.0f, odd = 0.0f, total;
      for (int pair = 0; pair < pairs; ++pair) {
        const uint8_t* a = state.data[left][row] + 4 * pair;
        const uint8_t* b = state.data[right][pair] + 4 * column;
        even += bfloat(a) * bfloat(b);
        odd += bfloat(a + 2) * bfloat(b + 2);
      }
      uint8_t* at = state.data[sum][row] + 4 * column;
      std::memcpy(&total, at, sizeof total);
      total += even + odd;
      std::memcpy(at, &total, sizeof total);
    }
  return true;
}

bool execute(const Instruction& i) {
  if (i.reg >= kTiles) return false;
  switch (i.opcode << 8 | i.prefix) {
    case 0x4900:
      if (i.memory) configure(i.address);
      else state = TileState{};
      return true;
    case 0x49F2:
      std::memset(state.data[i.reg], 0, sizeof state.data[i.reg]);
      return !i.memory;
    case 0x4BF2:
    case 0x4B66:
      if (i.memory) load(i.reg, i.address, i.stride);
      return i.memory;
    case 0x4BF3:
      if (i.memory) store(i.reg, i.address, i.stride);
      return i.memory;
    case 0x5CF3:
      return !i.memory && i.rm < kTiles && i.vvvv < kTiles && multiply(i.reg, i.rm, i.vvvv);
    default:
      return false;
  }
}

void on_illegal(int signal, siginfo_t*, void* raw) {
  ucontext_t* context = static_cast<ucontext_t*>(raw);
  auto& rip = context->uc_mcontext.gregs[REG_RIP];
  Instruction instruction{};
  if (decode(reinterpret_cast<const uint8_t*>(rip), context, instruction) && execute(instruction)) {
    rip += instruction.length;
    ++executed;
    return;
  }
  // Not ours: it is raised again for whoever was there before.
  sigaction(signal, &before, nullptr);
}

__attribute__((constructor)) void install() {
  struct sigaction action {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
}

}  // namespace

// How many instructions were executed here, in all threads.
extern "C" int64_t pdarts_emulated() { return executed; }
