// The instructions of the window attention that C++ cannot express. All other code is plain C++, so
// that the tests can run the same kernels on a CPU: they define the macro below and replace these
// functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device.cuh"

namespace swin_moe::cuda {

#ifdef SWIN_MOE_CUDA_EMULATION

using cuda_emulation::copy_async;
using cuda_emulation::exp2_flushed;
using cuda_emulation::load_matrices;
using cuda_emulation::load_matrices_transposed;
using cuda_emulation::multiply_accumulate;
using cuda_emulation::wait_for_copies;

#else

// 2^x in one instruction; denormal results are 0. exp2f spends three more to keep them.
__device__ __forceinline__ float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Copies 16 aligned bytes from global to shared memory, zeros unless `valid`; `from` must be an
// address of the tensor all the same. They have arrived when the same thread has waited.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" : : : "memory");
}

// Four 8x8 matrices of 16-bit numbers from shared memory. Lane l brings the address of row l % 8 of
// matrix l / 8, and gets numbers 2 * (l % 4) and the next of row l / 4 of each.
template <typename T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const T* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The same, with each matrix transposed.
template <typename T>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const T* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// d += a b, 16x16 times 16x8, fragments as PTX has them for mma.m16n8k16. With g = lane / 4 and
// t = lane % 4, d holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); a pairs from (g, 2t),
// (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) along the row; b pairs from (2t, g), (2t + 8, g) along
// the column. The first argument only names the type.
__device__ __forceinline__ void multiply_accumulate(__half, float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_accumulate(__nv_bfloat16, float (&d)[4],
                                                    const uint32_t (&a)[4], uint32_t b0,
                                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace swin_moe::cuda
