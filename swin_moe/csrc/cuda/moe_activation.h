// The ops between the matrix products of the experts, on CUDA: bias, GELU and dropout, their
// backward pass, and sums over rows. Pointers are device pointers to contiguous memory; every
// launch goes to `stream` and nothing waits for it. The device finds the rows of each expert from
// `used`, int64 [E]; more rows than there is room for stop a kernel with a device-side assertion. T
// is the dtype of a call.
#pragma once

#include <cuda_runtime_api.h>

#include "../types.h"

namespace swin_moe::cuda {

struct ExpertActivation {
  const void* bias;     // T [E, H]
  const int64_t* seed;  // [1], read if there is dropout
  double dropout;
  const void* pre;  // T [S, H]
  void* act;        // T [S, H], written; may be `pre` in the forward pass
  void* grad;       // T [S, H], backward: the gradient of act on entry, that of pre on return
  void* grad_bias;  // T [E, H], backward
};

// Bytes that the functions below with a `workspace` want, of which width is H or D.
int64_t experts_workspace(const ExpertsShape& shape, int64_t width);

// act = dropout(gelu(pre + bias)). Empty rows are left as they are.
cudaError_t expert_activation(DType dtype, const ExpertsShape& shape, const int64_t* used,
                              const ExpertActivation& tensors, cudaStream_t stream);

// act, the gradient of pre, and its sums over the rows of each expert, in a fixed order. With a
// stride both are zero in the empty rows that belong to an expert.
cudaError_t expert_activation_backward(DType dtype, const ExpertsShape& shape, const int64_t* used,
                                       const ExpertActivation& tensors, void* workspace,
                                       cudaStream_t stream);

// out[r] += bias[expert of r]; out T [S, D], bias T [E, D].
cudaError_t expert_add_bias(DType dtype, const ExpertsShape& shape, const int64_t* used,
                            const void* bias, void* out, cudaStream_t stream);

// sums[e] = the rows of expert e added up, in a fixed order; rows T [S, D], sums T [E, D].
cudaError_t expert_add_rows(DType dtype, const ExpertsShape& shape, const int64_t* used,
                            const void* rows, void* sums, void* workspace, cudaStream_t stream);

// to = rows with zeros in the empty ones that belong to an expert; both T [S, D], and a stride.
cudaError_t expert_clear_empty(DType dtype, const ExpertsShape& shape, const int64_t* used,
                               const void* rows, void* to, cudaStream_t stream);

// Zeros in the `size` elements of each expert that has no rows; weights T [E, size].
cudaError_t expert_clear_unused(DType dtype, const ExpertsShape& shape, const int64_t* used,
                                int64_t size, void* weights, cudaStream_t stream);

}  // namespace swin_moe::cuda
