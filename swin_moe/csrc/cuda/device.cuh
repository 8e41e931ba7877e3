// How kernels are launched and get their shared memory. The tests run the very same kernels on a
// CPU: they define the macro below and bring these functions of their own.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace swin_moe::cuda {

#ifdef SWIN_MOE_CUDA_EMULATION

using cuda_emulation::dynamic_shared_memory;
using cuda_emulation::launch;

#else

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Launches with dynamic shared memory, asking for more than the 48 KiB of the default if need be.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    // The device's limit, not this launch's: another thread may launch the kernel meanwhile.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

#endif

}  // namespace swin_moe::cuda
