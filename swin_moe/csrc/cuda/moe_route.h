// Routing on CUDA: from logits to row maps, and the gradient of the logits; all fp32. Pointers are
// device pointers to contiguous memory; every launch goes to `stream` and nothing waits for it.
// Sums are taken in a fixed order and atomics add integers only, so results do not vary from run to
// run. The semantics are in swin_moe/ops/moe_route.py.
#pragma once

#include <cuda_runtime_api.h>

#include "../types.h"

namespace swin_moe::cuda {

struct RouteInputs {
  const float* logits;  // [T, E]
  const float* noise;   // [T, E], or null
  const float* bias;    // [E], or null; the gradient needs none
};

struct RouteOutputs {
  float* gate;           // [T, k]
  float* sums;           // [3, E]
  float* scalars;        // [kRouteScalars]
  int64_t* expert;       // [T, k]
  int32_t* slot;         // [T, k]
  int32_t* source;       // [S]
  int32_t* destination;  // [T, k]
  int64_t* counts;       // [E], as are the next two
  int64_t* first;
  int64_t* used;
};

// Incoming gradients. Null: zeros.
struct RouteGrads {
  const float* gate;     // [T, k]
  const float* sums;     // [3, E]
  const float* scalars;  // [kRouteScalars], of which only the first counts
};

// Whether there are kernels for this many experts.
bool moe_route_supported(const RouteShape& shape);

// Bytes that moe_route needs to work with.
int64_t moe_route_workspace(const RouteShape& shape);

cudaError_t moe_route(const RouteShape& shape, const RouteOptions& options, const RouteInputs& in,
                      const RouteOutputs& out, void* workspace, cudaStream_t stream);

// For the experts that moe_route chose; one that is out of range stops the kernel.
cudaError_t moe_route_backward(const RouteShape& shape, const RouteOptions& options,
                               const RouteGrads& grads, const RouteInputs& in,
                               const int64_t* expert, float* grad_logits, cudaStream_t stream);

}  // namespace swin_moe::cuda
