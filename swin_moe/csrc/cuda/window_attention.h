// Attention within (shifted) windows on CUDA, from qkv to the heads' outputs, forward and backward.
// Pointers are device pointers to contiguous memory; every launch goes to `stream` and nothing
// waits for it. No atomics: results are the same bits on every run.
//
//   qkv, grad_qkv   [batch, height, width, 3, heads, head_dim]
//   bias, grad_bias [heads, N, N] fp32, N the tokens of one window; queries are the rows
//   scale, grad_scale [heads] fp32
//   seed            [1] int64, read iff dropout > 0
//   out, grad_out   [batch, height, width, heads * head_dim]
//   lse             [windows, heads, N] fp32: log2 of the sum of exp(logit) of a query, base 2 so
//                   that a probability is exp2(logit * log2(e) - lse); arbitrary for padded queries
#pragma once

#include <cuda_runtime_api.h>

#include "../types.h"

namespace swin_moe::cuda {

// Whether kernels exist: head_dim is 16, 32, 48 or 64, a window has at most 1024 tokens, and the
// grid has room for the windows. The launchers return cudaErrorInvalidValue for other shapes.
bool window_attention_supported(const WindowShape& shape);

// Bytes that backward needs at `workspace`, aligned to 16.
int64_t window_attention_workspace(const WindowShape& shape);

cudaError_t window_attention(DType dtype, const WindowShape& shape, const WindowOptions& options,
                             const void* qkv, const float* bias, const float* scale,
                             const int64_t* seed, void* out, float* lse, cudaStream_t stream);

// `out` and `lse` are those of forward. The gradients are written in full, none has to be zeroed.
cudaError_t window_attention_backward(DType dtype, const WindowShape& shape,
                                      const WindowOptions& options, const void* grad_out,
                                      const void* qkv, const float* bias, const float* scale,
                                      const int64_t* seed, const void* out, const float* lse,
                                      void* grad_qkv, float* grad_bias, float* grad_scale,
                                      void* workspace, cudaStream_t stream);

}  // namespace swin_moe::cuda
