// Expert dispatch and combine on CUDA: row gathers, forward and backward. Pointers are device
// pointers to contiguous memory; every launch goes to `stream` and nothing waits for it. An index
// out of range stops the kernel with a device-side assertion.
#pragma once

#include <cuda_runtime_api.h>

#include "../types.h"

namespace swin_moe::cuda {

// out[s] = x[source[s] / top_k], zeros where source[s] is -1.
cudaError_t moe_dispatch(DType dtype, const MoeShape& shape, const void* x, const int32_t* source,
                         void* out, cudaStream_t stream);

// out[t] = sum over j of gate[t, j] * table[destination[t, j]].
// This is combine, and with a null gate (all ones) the backward of dispatch.
cudaError_t moe_combine(DType dtype, const MoeShape& shape, const void* table, const float* gate,
                        const int32_t* destination, void* out, cudaStream_t stream);

// grad_y[s] = gate[a] * grad_out[a / top_k] for a = source[s], zeros where a is -1;
// grad_gate[a] = <grad_out[a / top_k], y[destination[a]]>, 0 where destination[a] is -1.
cudaError_t moe_combine_backward(DType dtype, const MoeShape& shape, const void* grad_out,
                                 const void* y, const float* gate, const int32_t* source,
                                 const int32_t* destination, void* grad_y, float* grad_gate,
                                 cudaStream_t stream);

}  // namespace swin_moe::cuda
