// The second half of the routing: queues and row maps from keys and choices.
#pragma once

#include "moe_route.h"

namespace swin_moe::cuda {

// Bytes that route_queues needs to work with.
int64_t route_queues_workspace(const RouteShape& shape);

// Fills the integers of `out` from its `expert` and the keys [T]; `keys` is overwritten.
cudaError_t route_queues(const RouteShape& shape, const RouteOptions& options, uint32_t* keys,
                         const RouteOutputs& out, void* workspace, cudaStream_t stream);

}  // namespace swin_moe::cuda
