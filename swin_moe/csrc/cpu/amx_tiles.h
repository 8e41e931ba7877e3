// The tile registers of AMX: eight matrices of 16 rows of 64 bytes, of which all are used in this
// one shape. Ends that do not fill one are padded with zeros in memory: less of a shape saves
// little of a product's time, and changing the configuration costs more than that.
//
// Numbers of tiles are part of an instruction, so they are template arguments here.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(SWIN_MOE_AMX_EMULATION)
#include "amx_emulation.h"  // of the tests: the intrinsics by other means, and checked
#endif

namespace swin_moe::cpu::amx {
namespace {

constexpr int kRows = 16;   // of a tile
constexpr int kWords = 16;  // in a row: fp32 sums, or pairs of bf16

// The operand of LDTILECFG.
struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr Configuration() {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = kWords * 4;
      rows[tile] = kRows;
    }
  }
};
static_assert(sizeof(Configuration) == 64, "the layout is the processor's");
// A constant: GCC does not see that its intrinsic reads all of it, and could drop stores to it.
constexpr Configuration kConfiguration;

// The tiles of this thread are set up while one lives; after that they cost its context switches
// nothing.
class Session {
 public:
  Session() { _tile_loadconfig(&kConfiguration); }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// GCC does not see that its intrinsic reads memory, and stores must not be moved past it. Those
// that follow are held back by the stores of tiles, which every product ends with.
inline void memory_is_read() { __asm__ volatile("" ::: "memory"); }

#define SWIN_MOE_FOR_TILES(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

template <int kTile>
inline void zero() {
#define SWIN_MOE_ZERO(N) \
  if constexpr (kTile == N) _tile_zero(N);
  SWIN_MOE_FOR_TILES(SWIN_MOE_ZERO)
#undef SWIN_MOE_ZERO
}

// Rows of words, `stride` words from one to the next.
template <int kTile>
inline void load(const void* from, int64_t stride) {
  memory_is_read();
#define SWIN_MOE_LOAD(N) \
  if constexpr (kTile == N) _tile_loadd(N, from, stride * 4);
  SWIN_MOE_FOR_TILES(SWIN_MOE_LOAD)
#undef SWIN_MOE_LOAD
}

template <int kTile>
inline void store(float* to, int64_t stride) {
#define SWIN_MOE_STORE(N) \
  if constexpr (kTile == N) _tile_stored(N, to, stride * 4);
  SWIN_MOE_FOR_TILES(SWIN_MOE_STORE)
#undef SWIN_MOE_STORE
}

// c[m][n] += sum over words w of a[m][w] . b[w][n]; sums are tiles 0 to 3, the rest is a and b.
template <int kSum, int kA, int kB>
inline void multiply_add() {
  static_assert(kSum < 4 && kA >= 4 && kA < 6 && kB >= 6 && kB < 8, "tiles by their use");
#define SWIN_MOE_DOT(C, A, B) \
  if constexpr (kSum == C && kA == A && kB == B) _tile_dpbf16ps(C, A, B);
#define SWIN_MOE_DOTS(A, B) \
  SWIN_MOE_DOT(0, A, B) SWIN_MOE_DOT(1, A, B) SWIN_MOE_DOT(2, A, B) SWIN_MOE_DOT(3, A, B)
  SWIN_MOE_DOTS(4, 6) SWIN_MOE_DOTS(4, 7) SWIN_MOE_DOTS(5, 6) SWIN_MOE_DOTS(5, 7)
#undef SWIN_MOE_DOTS
#undef SWIN_MOE_DOT
}

#undef SWIN_MOE_FOR_TILES

}  // namespace
}  // namespace swin_moe::cpu::amx
