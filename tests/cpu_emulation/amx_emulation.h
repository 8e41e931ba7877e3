// The tile instructions by other means, in place of the intrinsics: what they do is written down in
// Intel's Architecture Instruction Set Extensions reference, chapter on AMX. A thing that the
// processor forbids, or that no kernel means to do, ends the process with a message. Tiles hold
// NaNs where the processor has zeros after LDTILECFG: no kernel shall rest on those.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

struct Tile {
  int rows = 0;
  int row_bytes = 0;
  alignas(64) uint8_t data[16][64];
};

struct Machine {
  bool configured = false;
  Tile tiles[8];
};

inline Machine& machine() {
  thread_local Machine one;
  return one;
}

inline Tile& tile(int number) {
  require(number >= 0 && number < 8, "there are eight tiles");
  require(machine().configured, "a tile is used without a configuration");
  Tile& found = machine().tiles[number];
  require(found.rows > 0 && found.row_bytes > 0, "a tile is used that is not configured");
  return found;
}

inline void load_configuration(const void* from) {
  uint8_t bytes[64];
  std::memcpy(bytes, from, sizeof(bytes));
  require(!machine().configured, "a configuration is loaded over another");
  require(bytes[0] == 1, "the palette is not 1");
  require(bytes[1] == 0, "the start row is not 0");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes of a configuration are set");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    const int rows = bytes[48 + i];
    require(i < 8 || (rows == 0 && row_bytes == 0), "more than eight tiles are configured");
    require(rows <= 16, "a tile has more than 16 rows");
    require(row_bytes <= 64, "a row of a tile is longer than 64 bytes");
    require(row_bytes % 4 == 0, "a row of a tile is not whole words");
    require((rows == 0) == (row_bytes == 0), "a tile has rows or columns, but not both");
    if (i >= 8) continue;
    machine().tiles[i].rows = rows;
    machine().tiles[i].row_bytes = row_bytes;
    std::memset(machine().tiles[i].data, 0xff, sizeof(machine().tiles[i].data));
  }
  machine().configured = true;
}

inline void release() {
  require(machine().configured, "tiles are released twice");
  machine().configured = false;
}

inline void zero(int number) { std::memset(tile(number).data, 0, sizeof(Tile::data)); }

// A write leaves zeros in what of the register is not in the tile.
inline void load(int number, const void* from, int64_t stride) {
  Tile& to = tile(number);
  std::memset(to.data, 0, sizeof(to.data));
  for (int row = 0; row < to.rows; ++row) {
    std::memcpy(to.data[row], static_cast<const char*>(from) + row * stride, to.row_bytes);
  }
}

inline void store(int number, void* to, int64_t stride) {
  const Tile& from = tile(number);
  require(stride >= from.row_bytes, "rows of a tile are stored over one another");
  for (int row = 0; row < from.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, from.data[row], from.row_bytes);
  }
}

// Denormals are flushed and sums rounded to nearest, whatever the control register says.
class Control {
 public:
  Control() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8040); }
  ~Control() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// The even elements of the words are summed by themselves, so are the odd ones; then both, then
// those with what was there.
__attribute__((target("avx512f"))) inline void dot_bf16(int c_number, int a_number, int b_number) {
  Tile& c = tile(c_number);
  const Tile &a = tile(a_number), &b = tile(b_number);
  require(c_number != a_number && c_number != b_number && a_number != b_number,
          "a product takes three different tiles");
  require(c.rows == a.rows, "a product has not the rows of its left side");
  require(c.row_bytes == b.row_bytes, "a product has not the columns of its right side");
  require(a.row_bytes == 4 * b.rows, "the sides of a product do not fit");
  const Control control;
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < b.rows; ++k) {
      uint32_t word;
      std::memcpy(&word, a.data[m] + 4 * k, sizeof(word));
      const __m512i left = _mm512_set1_epi32(static_cast<int>(word));
      const __m512i right = _mm512_load_si512(b.data[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(right, high)), odd);
    }
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(c.data[m]), _mm512_add_ps(even, odd));
    std::memset(c.data[m], 0, sizeof(c.data[m]));
    std::memcpy(c.data[m], &sum, c.row_bytes);
  }
}

}  // namespace amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::load_configuration
#define _tile_release amx_emulation::release
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_zero amx_emulation::zero
#define _tile_dpbf16ps amx_emulation::dot_bf16
