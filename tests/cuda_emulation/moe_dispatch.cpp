// The launchers of dispatch and combine for ctypes.
#include "../../swin_moe/csrc/cuda/moe_dispatch.h"

using swin_moe::DType;
using swin_moe::MoeShape;
namespace cuda = swin_moe::cuda;

extern "C" {

int moe_dispatch(int dtype, const MoeShape* shape, const void* x, const int32_t* source,
                 void* out) {
  return cuda::moe_dispatch(static_cast<DType>(dtype), *shape, x, source, out, nullptr);
}

int moe_combine(int dtype, const MoeShape* shape, const void* table, const float* gate,
                const int32_t* destination, void* out) {
  return cuda::moe_combine(static_cast<DType>(dtype), *shape, table, gate, destination, out,
                           nullptr);
}

int moe_combine_backward(int dtype, const MoeShape* shape, const void* grad_out, const void* y,
                         const float* gate, const int32_t* source, const int32_t* destination,
                         void* grad_y, float* grad_gate) {
  return cuda::moe_combine_backward(static_cast<DType>(dtype), *shape, grad_out, y, gate, source,
                                    destination, grad_y, grad_gate, nullptr);
}

}  // extern "C"
