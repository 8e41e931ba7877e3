// x86-64 with AVX512-BF16: pairs of bf16 are multiplied and added in one instruction.
#include "target.h"

#if SWIN_MOE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,prefer-vector-width=512")
#include "moe_activation_kernels.h"
#include "simd_avx512_bf16.h"
#include "window_kernels.h"

namespace swin_moe::cpu {

extern const WindowKernels kAvx512Bf16Kernels{"avx512_bf16", forward<Avx512Bf16>,
                                              backward<Avx512Bf16>};
extern const ExpertKernels kAvx512Bf16Experts = expert_kernels_of<Avx512Bf16>("avx512_bf16");

}  // namespace swin_moe::cpu
#endif
