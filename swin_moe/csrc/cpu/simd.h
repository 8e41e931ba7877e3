// Vectors of fp32 lanes, and rows of elements packed into 32-bit words: one fp32, or a pair of bf16.
//
// `Simd<L>` is written in the compiler's vector extension and right on any processor; the
// instruction sets in isa_*.cpp derive from it and hide functions that they do better. A file first
// selects its instruction set, then includes this one. Everything here is local to that file: code
// for one processor must never be linked into another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define SWIN_MOE_INLINE inline __attribute__((always_inline))
#define SWIN_MOE_LAMBDA __attribute__((always_inline))

namespace swin_moe::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

// Elements in a word.
template <typename T>
constexpr int kPair = sizeof(uint32_t) / sizeof(T);

// The vector types, spelled out per width: compilers drop the attribute in a dependent type.
template <int L>
struct Lanes;
#define SWIN_MOE_LANES(L)                                                                     \
  template <>                                                                                 \
  struct Lanes<L> {                                                                           \
    typedef float Float __attribute__((vector_size(4 * L)));                                  \
    typedef int32_t Int __attribute__((vector_size(4 * L)));                                  \
    typedef uint32_t Word __attribute__((vector_size(4 * L)));                                \
    typedef float LooseFloat __attribute__((vector_size(4 * L), aligned(4), may_alias));      \
    typedef uint32_t LooseWord __attribute__((vector_size(4 * L), aligned(4), may_alias));    \
    typedef uint16_t Half __attribute__((vector_size(2 * L), aligned(2), may_alias));         \
  };
SWIN_MOE_LANES(4)
SWIN_MOE_LANES(8)
SWIN_MOE_LANES(16)
#undef SWIN_MOE_LANES

template <int L>
struct Simd {
  static constexpr int kLanes = L;
  static constexpr bool kBf16Only = false;  // fp32 has kernels elsewhere
  static constexpr bool kTiles = false;     // it multiplies matrices, 16 by 16 results at a time
  struct Session {};                        // must live while kernels run
  using Float = typename Lanes<L>::Float;
  using Int = typename Lanes<L>::Int;
  using Word = typename Lanes<L>::Word;
  using LooseFloat = typename Lanes<L>::LooseFloat;
  using LooseWord = typename Lanes<L>::LooseWord;
  using Half = typename Lanes<L>::Half;

  static SWIN_MOE_INLINE Float set(float value) { return value - Float{}; }
  static SWIN_MOE_INLINE Word set(uint32_t value) { return value - Word{}; }
  static SWIN_MOE_INLINE Float load(const float* from) {
    return *reinterpret_cast<const LooseFloat*>(from);
  }
  static SWIN_MOE_INLINE Word load(const uint32_t* from) {
    return *reinterpret_cast<const LooseWord*>(from);
  }
  static SWIN_MOE_INLINE void store(Float value, float* to) {
    *reinterpret_cast<LooseFloat*>(to) = value;
  }
  static SWIN_MOE_INLINE void store(Word value, uint32_t* to) {
    *reinterpret_cast<LooseWord*>(to) = value;
  }

  static SWIN_MOE_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
  // b where either is a NaN, as x86 has it.
  static SWIN_MOE_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
  static SWIN_MOE_INLINE Float sqrt(Float a) {
    for (int i = 0; i < L; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
  }

  // Words hold the bits of floats: reinterpreted, never converted.
  static SWIN_MOE_INLINE Float as_float(Word value) { return (Float)value; }
  static SWIN_MOE_INLINE Word as_word(Float value) { return (Word)value; }

  // Round to nearest, ties to even; a NaN stays one. In the upper halves of the words.
  static SWIN_MOE_INLINE Word round_high(Float value) {
    const Word bits = as_word(value);
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    const Word nan = (Word)(value != value);
    return (nan & 0x7fc00000u) | (~nan & rounded);
  }

  // acc + a . b over the elements of each word, which have type T.
  template <typename T, typename Isa>
  static SWIN_MOE_INLINE Float dot(Float acc, Word a, Word b) {
    if constexpr (kPair<T> == 1) {
      return Isa::fma(as_float(a), as_float(b), acc);
    } else {
      acc = Isa::fma(as_float(a << 16), as_float(b << 16), acc);
      return Isa::fma(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u), acc);
    }
  }

  // L consecutive elements of a row.
  static SWIN_MOE_INLINE Float load_row(const float* from) { return load(from); }
  static SWIN_MOE_INLINE Float load_row(const BFloat16* from) {
    return as_float(load_half(from) << 16);
  }
  static SWIN_MOE_INLINE Word load_half(const BFloat16* from) {
    return __builtin_convertvector(*reinterpret_cast<const Half*>(from), Word);
  }
  static SWIN_MOE_INLINE void store_row(Float value, float* to) { store(value, to); }
  static SWIN_MOE_INLINE void store_row(Float value, BFloat16* to) {
    *reinterpret_cast<Half*>(to) = __builtin_convertvector(round_high(value) >> 16, Half);
  }

  // Two rows of L elements, and their words: lane i holds (low[i], high[i]).
  static SWIN_MOE_INLINE Word zip(const BFloat16* low, const BFloat16* high) {
    return load_half(low) | (load_half(high) << 16);
  }
  static SWIN_MOE_INLINE Word zip_round(Float low, Float high) {
    return (round_high(low) >> 16) | round_high(high);
  }
  // Both at once: the rows for themselves and zipped.
  template <typename Isa>
  static SWIN_MOE_INLINE Word store_rows(Float low, Float high, BFloat16* to_low,
                                         BFloat16* to_high) {
    Isa::store_row(low, to_low);
    Isa::store_row(high, to_high);
    return Isa::zip_round(low, high);
  }

  // Where `bit` of the lane number is clear: a's lanes and b's, each put to the lanes of its half.
  template <typename V>
  static SWIN_MOE_INLINE void exchange(V& a, V& b, int bit) {
    Int low, high;
    for (int i = 0; i < L; ++i) {
      low[i] = (i & bit) ? L + (i ^ bit) : i;
      high[i] = (i & bit) ? L + i : (i ^ bit);
    }
#if defined(__clang__)  // whose shuffles want their order as template arguments
    const V before_a = a, before_b = b;
    for (int i = 0; i < L; ++i) {
      a[i] = low[i] < L ? before_a[low[i]] : before_b[low[i] - L];
      b[i] = high[i] < L ? before_a[high[i]] : before_b[high[i] - L];
    }
#else
    const V first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
#endif
  }
  // L vectors as an L x L matrix, transposed in place.
  template <int kBit = 1>
  static SWIN_MOE_INLINE void transpose(Word (&rows)[L]) {
    if constexpr (kBit < L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (!(i & kBit)) exchange(rows[i], rows[i | kBit], kBit);
      }
      transpose<2 * kBit>(rows);
    }
  }
  // Lane i of the result is the sum of the lanes of vector i.
  template <int kBit = 1>
  static SWIN_MOE_INLINE Float sums(Float (&rows)[L]) {
    if constexpr (kBit < L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; i += 2 * kBit) {
        exchange(rows[i], rows[i + kBit], kBit);
        rows[i] += rows[i + kBit];
      }
      return sums<2 * kBit>(rows);
    } else {
      return rows[0];
    }
  }
};

// Denormals are taken for zero while one lives: exp(-100) makes them, and they are slow.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace
}  // namespace swin_moe::cpu
