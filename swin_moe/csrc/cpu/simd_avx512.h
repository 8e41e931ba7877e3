// AVX-512 in place of the portable operations that compilers do not find by themselves.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace swin_moe::cpu {
namespace {

struct Avx512 : Simd<16> {
  static constexpr int kRegisters = 32;
  static SWIN_MOE_INLINE Float fma(Float a, Float b, Float c) {
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static SWIN_MOE_INLINE Float max(Float a, Float b) {
    return (Float)_mm512_max_ps((__m512)a, (__m512)b);
  }
  static SWIN_MOE_INLINE Float sqrt(Float a) { return (Float)_mm512_sqrt_ps((__m512)a); }
};

}  // namespace
}  // namespace swin_moe::cpu
