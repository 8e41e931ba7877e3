#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <initializer_list>

#include "device.cuh"
#include "moe_dispatch.h"

namespace swin_moe::cuda {
namespace {

// One warp per output row: indices are read once per row and a dot product needs no shared memory.
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarp * kWarpsPerBlock;
constexpr int kVectorBytes = 16;

// `N` neighbouring elements that are loaded and stored in one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  static constexpr int kSize = N;
  T values[N];
};

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ void store(float value, float* out) { *out = value; }
__device__ void store(float value, __half* out) { *out = __float2half_rn(value); }
__device__ void store(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// The token of an assignment. Both numbers are int32: a division of 64 bits takes far longer.
__device__ int64_t token_of(int64_t assignment, int64_t top_k) {
  return static_cast<int32_t>(assignment) / static_cast<int32_t>(top_k);
}

// The row of this warp.
__device__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}

__device__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

template <typename P>
__global__ void dispatch_kernel(MoeShape shape, const P* __restrict__ x,
                                const int32_t* __restrict__ source, P* __restrict__ out) {
  const int64_t s = warp_row();
  if (s >= shape.slots) return;
  const int64_t columns = shape.width / P::kSize;
  const int64_t a = source[s];
  assert(a >= -1 && a < shape.tokens * shape.top_k);
  const P* from = x + (a < 0 ? 0 : token_of(a, shape.top_k)) * columns;
  P* to = out + s * columns;
  for (int64_t c = lane(); c < columns; c += kWarp) to[c] = a < 0 ? P{} : from[c];
}

template <typename P>
__global__ void combine_kernel(MoeShape shape, const P* __restrict__ table,
                               const float* __restrict__ gate,
                               const int32_t* __restrict__ destination, P* __restrict__ out) {
  const int64_t t = warp_row();
  if (t >= shape.tokens) return;
  const int64_t columns = shape.width / P::kSize;
  for (int64_t c = lane(); c < columns; c += kWarp) {
    float sum[P::kSize] = {};
    for (int64_t a = t * shape.top_k; a < (t + 1) * shape.top_k; ++a) {
      const int64_t s = destination[a];
      assert(s >= -1 && s < shape.slots);
      if (s < 0) continue;
      const float weight = gate == nullptr ? 1.0f : gate[a];
      const P row = table[s * columns + c];
#pragma unroll
      for (int i = 0; i < P::kSize; ++i) sum[i] += weight * to_float(row.values[i]);
    }
    P result;
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) store(sum[i], &result.values[i]);
    out[t * columns + c] = result;
  }
}

// A warp does one slot: its row of grad_y, and its assignment's gate gradient. The assignments
// without a slot are zeroed by the same grid, thread by thread.
template <typename P>
__global__ void combine_backward_kernel(MoeShape shape, const P* __restrict__ grad_out,
                                        const P* __restrict__ y, const float* __restrict__ gate,
                                        const int32_t* __restrict__ source,
                                        const int32_t* __restrict__ destination,
                                        P* __restrict__ grad_y, float* __restrict__ grad_gate) {
  const int64_t s = warp_row();
  const int64_t assignments = shape.tokens * shape.top_k;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t a = s * kWarp + lane(); a < assignments; a += threads) {
    const int64_t slot = destination[a];
    assert(slot >= -1 && slot < shape.slots && (slot < 0 || source[slot] == a));
    if (slot < 0) grad_gate[a] = 0.0f;
  }
  if (s >= shape.slots) return;

  const int64_t columns = shape.width / P::kSize;
  const int64_t a = source[s];
  assert(a >= -1 && a < assignments && (a < 0 || destination[a] == s));
  if (a < 0) {
    for (int64_t c = lane(); c < columns; c += kWarp) grad_y[s * columns + c] = P{};
    return;
  }
  const float weight = gate[a];
  const P* grad = grad_out + token_of(a, shape.top_k) * columns;
  float dot = 0.0f;
  for (int64_t c = lane(); c < columns; c += kWarp) {
    const P g = grad[c];
    const P value = y[s * columns + c];
    P scaled;
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      dot += to_float(g.values[i]) * to_float(value.values[i]);
      store(weight * to_float(g.values[i]), &scaled.values[i]);
    }
    grad_y[s * columns + c] = scaled;
  }
  for (int half = kWarp / 2; half > 0; half /= 2) dot += __shfl_xor_sync(~0u, dot, half);
  if (lane() == 0) grad_gate[a] = dot;
}

// Calls `body` with the widest pack that these rows allow. A width that is no multiple of the
// vector leaves every second row misaligned, so such rows go element by element.
template <typename Body>
cudaError_t with_pack(DType dtype, int64_t width, std::initializer_list<const void*> matrices,
                      const Body& body) {
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  bool vectorised = width * element % kVectorBytes == 0;
  for (const void* matrix : matrices) {
    vectorised &= reinterpret_cast<uintptr_t>(matrix) % kVectorBytes == 0;
  }
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    return vectorised ? body(Pack<T, kVectorBytes / sizeof(T)>{}) : body(Pack<T, 1>{});
  };
  switch (dtype) {
    case DType::kFloat32: return of(float{});
    case DType::kFloat16: return of(__half{});
    case DType::kBFloat16: return of(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

int64_t blocks_for(int64_t rows) { return (rows + kWarpsPerBlock - 1) / kWarpsPerBlock; }

}  // namespace

cudaError_t moe_dispatch(DType dtype, const MoeShape& shape, const void* x, const int32_t* source,
                         void* out, cudaStream_t stream) {
  if (shape.slots == 0) return cudaSuccess;
  return with_pack(dtype, shape.width, {x, out}, [&](auto pack) {
    using P = decltype(pack);
    return launch(dispatch_kernel<P>, blocks_for(shape.slots), kThreads, 0, stream, shape,
                  static_cast<const P*>(x), source, static_cast<P*>(out));
  });
}

cudaError_t moe_combine(DType dtype, const MoeShape& shape, const void* table, const float* gate,
                        const int32_t* destination, void* out, cudaStream_t stream) {
  if (shape.tokens == 0) return cudaSuccess;
  return with_pack(dtype, shape.width, {table, out}, [&](auto pack) {
    using P = decltype(pack);
    return launch(combine_kernel<P>, blocks_for(shape.tokens), kThreads, 0, stream, shape,
                  static_cast<const P*>(table), gate, destination, static_cast<P*>(out));
  });
}

cudaError_t moe_combine_backward(DType dtype, const MoeShape& shape, const void* grad_out,
                                 const void* y, const float* gate, const int32_t* source,
                                 const int32_t* destination, void* grad_y, float* grad_gate,
                                 cudaStream_t stream) {
  if (shape.slots == 0 && shape.tokens == 0) return cudaSuccess;
  // With no slots at all one block still zeroes the gate gradients.
  const int64_t blocks = blocks_for(shape.slots > 0 ? shape.slots : 1);
  return with_pack(dtype, shape.width, {grad_out, y, grad_y}, [&](auto pack) {
    using P = decltype(pack);
    return launch(combine_backward_kernel<P>, blocks, kThreads, 0, stream, shape,
                  static_cast<const P*>(grad_out), static_cast<const P*>(y), gate, source,
                  destination, static_cast<P*>(grad_y), grad_gate);
  });
}

}  // namespace swin_moe::cuda
