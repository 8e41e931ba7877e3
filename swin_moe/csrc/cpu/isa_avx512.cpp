// x86-64 with AVX-512; bf16 is widened to fp32 before it is multiplied.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
#include "simd_avx512.h"
#include "window_kernels.h"

namespace swin_moe::cpu {

extern const WindowKernels kAvx512Kernels{"avx512", forward<Avx512>, backward<Avx512>};

}  // namespace swin_moe::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
