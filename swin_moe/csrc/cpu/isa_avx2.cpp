// x86-64 with AVX2 and FMA.
#include "target.h"

#if SWIN_MOE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC target("avx2,fma")
#include "adamw_kernels.h"
#include "moe_activation_kernels.h"
#include "window_kernels.h"

namespace swin_moe::cpu {
namespace {

struct Avx2 : Simd<8> {
  static constexpr int kRegisters = 16;
  static SWIN_MOE_INLINE Float fma(Float a, Float b, Float c) {
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  static SWIN_MOE_INLINE Float max(Float a, Float b) {
    return (Float)_mm256_max_ps((__m256)a, (__m256)b);
  }
  static SWIN_MOE_INLINE Float sqrt(Float a) { return (Float)_mm256_sqrt_ps((__m256)a); }
};

}  // namespace

extern const WindowKernels kAvx2Kernels{"avx2", forward<Avx2>, backward<Avx2>};
extern const ExpertKernels kAvx2Experts = expert_kernels_of<Avx2>("avx2");
extern const AdamwKernels kAvx2Adamw = adamw_kernels_of<Avx2>("avx2");

}  // namespace swin_moe::cpu
#endif
