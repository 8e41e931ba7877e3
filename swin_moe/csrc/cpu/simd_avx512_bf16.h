// AVX512-BF16: pairs of bf16 are multiplied and added in one instruction.
#pragma once

#include "simd_avx512.h"

namespace swin_moe::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kBf16Only = true;
  template <typename T, typename Isa>
  static SWIN_MOE_INLINE Float dot(Float acc, Word a, Word b) {
    if constexpr (kPair<T> == 1) {
      return fma(as_float(a), as_float(b), acc);
    } else {
      return (Float)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    }
  }
  static SWIN_MOE_INLINE void store_row(Float value, float* to) { store(value, to); }
  static SWIN_MOE_INLINE void store_row(Float value, BFloat16* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &rounded, sizeof(rounded));
  }
  // [low | high] to words (low[i], high[i]).
  static SWIN_MOE_INLINE Word interleave(__m512i halves) {
    const __m512i order = (__m512i)(Word){
        0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005,
        0x00160006, 0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b,
        0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f};
    return (Word)_mm512_permutexvar_epi16(order, halves);
  }
  static SWIN_MOE_INLINE Word zip_round(Float low, Float high) {
    return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  template <typename Isa>
  static SWIN_MOE_INLINE Word store_rows(Float low, Float high, BFloat16* to_low,
                                         BFloat16* to_high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m256i first = _mm512_castsi512_si256(halves);
    const __m256i second = _mm512_extracti64x4_epi64(halves, 1);
    std::memcpy(to_low, &first, sizeof(first));
    std::memcpy(to_high, &second, sizeof(second));
    return interleave(halves);
  }
};

}  // namespace
}  // namespace swin_moe::cpu
