// x86-64 with AVX-512; bf16 is widened to fp32 before it is multiplied.
#include "target.h"

#if SWIN_MOE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#include "adamw_kernels.h"
#include "moe_activation_kernels.h"
#include "simd_avx512.h"
#include "window_kernels.h"

namespace swin_moe::cpu {

extern const WindowKernels kAvx512Kernels{"avx512", forward<Avx512>, backward<Avx512>};
extern const ExpertKernels kAvx512Experts = expert_kernels_of<Avx512>("avx512");
extern const AdamwKernels kAvx512Adamw = adamw_kernels_of<Avx512>("avx512");

}  // namespace swin_moe::cpu
#endif
