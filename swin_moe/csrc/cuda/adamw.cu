// A thread updates one vector of elements: see swin_moe/ops/adamw.py for the arithmetic. Every
// operation is rounded by itself, so that the bits are those of the other devices.
#include "adamw.h"

#include <cuda_bf16.h>

#include "device.cuh"
#include "dropout.cuh"

namespace swin_moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements: 16 bytes of fp32

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Bits whose upper half is the value, rounded to bf16 by a random number of 16 bits. Inf stays inf,
// and a NaN is canonical: the sum could carry others into zero.
__device__ __forceinline__ uint32_t rounded(float value, uint32_t random) {
  return value != value ? 0x7fc00000u : __float_as_uint(value) + random;
}

__device__ __forceinline__ void update(const AdamwFactors& f, float& weight, float g,
                                       uint32_t& pair, uint32_t random) {
  float first = __uint_as_float(pair & 0xffff0000u), second = __uint_as_float(pair << 16);
  first = __fadd_rn(first, __fmul_rn(__fsub_rn(g, first), f.gain1));
  second = __fadd_rn(__fmul_rn(second, f.beta2), __fmul_rn(__fmul_rn(g, f.gain2), g));
  const float change = __fdiv_rn(__fmul_rn(first, f.rate), __fadd_rn(__fsqrt_rn(second), f.eps));
  weight = __fsub_rn(__fmul_rn(weight, f.decay), change);
  pair = (rounded(first, random >> 16) & 0xffff0000u) | (rounded(second, random & 0xffffu) >> 16);
}

// Pointers are aligned to N elements.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamwFactors f, int64_t size, float* __restrict__ weights,
                 const T* __restrict__ gradient, uint32_t* __restrict__ pairs) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (first >= size) return;
  const uint32_t key = random_row(static_cast<uint64_t>(first) >> 32, f.step);
  const uint32_t place = static_cast<uint32_t>(first);
  if (first + N <= size) {
    auto& weight = *reinterpret_cast<Vector<float, N>*>(weights + first);
    auto& pair = *reinterpret_cast<Vector<uint32_t, N>*>(pairs + first);
    Vector<float, N> w = weight;
    const auto g = *reinterpret_cast<const Vector<T, N>*>(gradient + first);
    Vector<uint32_t, N> p = pair;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      update(f, w.values[i], widen(g.values[i]), p.values[i], random_element(key, place + i));
    }
    weight = w;
    pair = p;
    return;
  }
  for (int i = 0; first + i < size; ++i) {
    update(f, weights[first + i], widen(gradient[first + i]), pairs[first + i],
           random_element(key, place + i));
  }
}

bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename T, int N>
cudaError_t run(const AdamwFactors& factors, const AdamwTensors& tensors, cudaStream_t stream) {
  const int64_t elements = int64_t{kThreads} * N;
  return launch(adamw_kernel<T, N>, (tensors.size + elements - 1) / elements, kThreads, 0, stream,
                factors, tensors.size, tensors.weights, static_cast<const T*>(tensors.gradient),
                tensors.pairs);
}

template <typename T>
cudaError_t run(const AdamwFactors& factors, const AdamwTensors& tensors, cudaStream_t stream) {
  const bool vectors = aligned(tensors.weights, kVector * sizeof(float)) &&
                       aligned(tensors.pairs, kVector * sizeof(uint32_t)) &&
                       aligned(tensors.gradient, kVector * sizeof(T));
  return vectors ? run<T, kVector>(factors, tensors, stream) : run<T, 1>(factors, tensors, stream);
}

}  // namespace

cudaError_t adamw(const AdamwFactors& factors, const AdamwTensors& tensors, cudaStream_t stream) {
  if (tensors.size == 0) return cudaSuccess;
  return tensors.dtype == DType::kBFloat16 ? run<__nv_bfloat16>(factors, tensors, stream)
                                           : run<float>(factors, tensors, stream);
}

}  // namespace swin_moe::cuda
