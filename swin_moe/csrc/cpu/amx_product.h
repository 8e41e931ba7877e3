// Products of whole matrices of bf16 by tiles, with four tiles of sums at a time: four products are
// in flight at once, and each loaded tile is used twice.
#pragma once

#include <utility>

#include "amx_tiles.h"
#include "simd.h"

namespace swin_moe::cpu::amx {
namespace {

// c [rows][columns] = (c +) a [rows][words] . b [words][columns], whose words are pairs of bf16.
// Strides count words. `words`, rows and columns are multiples of 16.
struct Product {
  const uint32_t* a;
  int64_t a_stride;
  const uint32_t* b;
  int64_t b_stride;
  int64_t words;
  float* c;
  int64_t c_stride;
  bool add;
};

// kM x kN tiles of the sums.
template <int kM, int kN>
class Block {
  static_assert(kM * kN <= 4, "there are four tiles for sums");

 public:
  static void run(const Product& p, int64_t row, int64_t column) {
    const uint32_t* a = p.a + row * p.a_stride;
    const uint32_t* b = p.b + column;
    float* c = p.c + row * p.c_stride + column;
    begin(p, c, std::make_integer_sequence<int, kM * kN>{});
    for (int64_t w = 0; w < p.words; w += kWords) {
      step(a + w, p.a_stride, b + w * p.b_stride, p.b_stride);
    }
    end(p, c, std::make_integer_sequence<int, kM * kN>{});
  }

 private:
  template <int... kSums>
  static SWIN_MOE_INLINE void begin(const Product& p, float* c,
                                    std::integer_sequence<int, kSums...>) {
    if (p.add) {
      (load<kSums>(place<kSums>(p, c), p.c_stride), ...);
    } else {
      (zero<kSums>(), ...);
    }
  }
  template <int... kSums>
  static SWIN_MOE_INLINE void end(const Product& p, float* c,
                                  std::integer_sequence<int, kSums...>) {
    (store<kSums>(place<kSums>(p, c), p.c_stride), ...);
  }
  template <int kSum>
  static SWIN_MOE_INLINE float* place(const Product& p, float* c) {
    return c + kSum / kN * kRows * p.c_stride + kSum % kN * kWords;
  }

  // The shorter side stays in its tiles, the other passes through two.
  static SWIN_MOE_INLINE void step(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                   int64_t b_stride) {
    if constexpr (kM <= kN) {
      load<4>(a, a_stride);
      if constexpr (kM == 2) load<5>(a + kRows * a_stride, a_stride);
      pass(b, b_stride, std::make_integer_sequence<int, kN>{});
    } else {
      load<6>(b, b_stride);
      pass(a, a_stride, std::make_integer_sequence<int, kM>{});
    }
  }
  template <int... kEach>
  static SWIN_MOE_INLINE void pass(const uint32_t* from, int64_t stride,
                                   std::integer_sequence<int, kEach...>) {
    (one<kEach>(from, stride), ...);
  }
  template <int kEach>
  static SWIN_MOE_INLINE void one(const uint32_t* from, int64_t stride) {
    if constexpr (kM <= kN) {
      load<6 + kEach % 2>(from + kEach * kWords, stride);
      multiply_add<kEach, 4, 6 + kEach % 2>();
      if constexpr (kM == 2) multiply_add<kN + kEach, 5, 6 + kEach % 2>();
    } else {
      static_assert(kN == 1, "a tall block has one column");
      load<4 + kEach % 2>(from + kEach * kRows * stride, stride);
      multiply_add<kEach, 4 + kEach % 2, 6>();
    }
  }
};

// An even number of tiles above one another.
inline void multiply_column(const Product& p, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + 4 * kRows <= rows; row += 4 * kRows) Block<4, 1>::run(p, row, column);
  for (; row + 2 * kRows <= rows; row += 2 * kRows) Block<2, 1>::run(p, row, column);
}

inline void multiply_row(const Product& p, int64_t row, int64_t columns) {
  int64_t column = 0;
  for (; column + 4 * kWords <= columns; column += 4 * kWords) Block<1, 4>::run(p, row, column);
  for (; column + 2 * kWords <= columns; column += 2 * kWords) Block<1, 2>::run(p, row, column);
  if (column < columns) Block<1, 1>::run(p, row, column);
}

inline void multiply(const Product& p, int64_t rows, int64_t columns) {
  const int64_t paired_rows = rows / (2 * kRows) * (2 * kRows);
  const int64_t paired_columns = columns / (2 * kWords) * (2 * kWords);
  for (int64_t row = 0; row < paired_rows; row += 2 * kRows) {
    for (int64_t column = 0; column < paired_columns; column += 2 * kWords) {
      Block<2, 2>::run(p, row, column);
    }
  }
  if (paired_columns < columns) multiply_column(p, paired_rows, paired_columns);
  if (paired_rows < rows) multiply_row(p, paired_rows, columns);
}

}  // namespace
}  // namespace swin_moe::cpu::amx
