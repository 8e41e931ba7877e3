// AdamW with bf16 moments on CUDA, in one pass over memory. Pointers are device pointers; the
// launch goes to `stream` and nothing waits for it.
#pragma once

#include <cuda_runtime_api.h>

#include "../adamw.h"

namespace swin_moe::cuda {

cudaError_t adamw(const AdamwFactors& factors, const AdamwTensors& tensors, cudaStream_t stream);

}  // namespace swin_moe::cuda
