// Kernels with the faults that the emulation is to find.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

using cuda_emulation::dynamic_shared_memory;

void no_fault_kernel(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

void some_skip_the_barrier_kernel(float*) {
  if (threadIdx.x < 40) __syncthreads();
}

void collectives_differ_kernel(float* out) {
  out[threadIdx.x] = 0.0f;
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  }
}

void shared_memory_overflows_kernel(float*) {
  reinterpret_cast<float*>(dynamic_shared_memory())[64 + threadIdx.x] = 0.0f;
}

void misaligned_matrix_kernel(float*) {
  uint32_t matrices[4];
  cuda_emulation::load_matrices(
      matrices, reinterpret_cast<const __half*>(dynamic_shared_memory()) + threadIdx.x % 2);
}

void no_wait_for_copies_kernel(float* out) {
  cuda_emulation::copy_async(dynamic_shared_memory(), out, true);
}

// Not an error but a difference: threads read what others may not have written.
void no_barrier_kernel(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

}  // namespace

// Runs kernel `index` with 64 threads and a float of shared memory for each.
extern "C" int run_faulty(int index, float* out) {
  void (*kernels[])(float*) = {
      no_fault_kernel,          some_skip_the_barrier_kernel, collectives_differ_kernel,
      misaligned_matrix_kernel, no_wait_for_copies_kernel,    shared_memory_overflows_kernel,
      no_barrier_kernel};
  return cuda_emulation::launch(kernels[index], 1, 64, 64 * sizeof(float), nullptr, out);
}
