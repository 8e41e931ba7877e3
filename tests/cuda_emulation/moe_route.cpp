// The launchers of the routing for ctypes.
#include "../../swin_moe/csrc/cuda/moe_route.h"

using swin_moe::RouteOptions;
using swin_moe::RouteShape;
using swin_moe::cuda::RouteGrads;
using swin_moe::cuda::RouteInputs;
using swin_moe::cuda::RouteOutputs;

extern "C" {

bool moe_route_supported(const RouteShape* shape) {
  return swin_moe::cuda::moe_route_supported(*shape);
}

int64_t moe_route_workspace(const RouteShape* shape) {
  return swin_moe::cuda::moe_route_workspace(*shape);
}

int moe_route(const RouteShape* shape, const RouteOptions* options, const float* logits,
              const float* noise, const float* bias, float* gate, float* sums, float* scalars,
              int64_t* expert, int32_t* slot, int32_t* source, int32_t* destination,
              int64_t* counts, int64_t* first, int64_t* used, void* workspace) {
  const RouteOutputs out{gate,   sums,        scalars, expert, slot,
                         source, destination, counts,  first,  used};
  return swin_moe::cuda::moe_route(*shape, *options, {logits, noise, bias}, out, workspace,
                                   nullptr);
}

int moe_route_backward(const RouteShape* shape, const RouteOptions* options,
                       const float* grad_gate, const float* grad_sums, const float* grad_scalars,
                       const float* logits, const float* noise, const int64_t* expert,
                       float* grad_logits) {
  const RouteGrads grads{grad_gate, grad_sums, grad_scalars};
  return swin_moe::cuda::moe_route_backward(*shape, *options, grads, {logits, noise, nullptr},
                                            expert, grad_logits, nullptr);
}

// Two faults that the emulation is to find.
int fill_nothing() { return cudaMemsetAsync(nullptr, 0, 0, nullptr); }

int launch_nothing() {
  return cuda_emulation::launch(+[](int) {}, 0, 32, 0, nullptr, 0);
}

}  // extern "C"
