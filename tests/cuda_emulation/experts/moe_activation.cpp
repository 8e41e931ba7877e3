// The launchers of what lies between the products of the experts, for ctypes.
#include "../../../swin_moe/csrc/cuda/moe_activation.h"

using swin_moe::DType;
using swin_moe::ExpertsShape;
namespace cuda = swin_moe::cuda;

extern "C" {

const char* emulation_error() { return cuda_emulation::machine().error.c_str(); }

void emulation_reverse(bool reversed) { cuda_emulation::machine().reversed = reversed; }

int64_t experts_workspace(const ExpertsShape* shape, int64_t width) {
  return cuda::experts_workspace(*shape, width);
}

int activation(int dtype, const ExpertsShape* shape, const int64_t* used, const void* bias,
               const int64_t* seed, double dropout, const void* pre, void* act) {
  const cuda::ExpertActivation tensors{bias, seed, dropout, pre, act, nullptr, nullptr};
  return cuda::expert_activation(static_cast<DType>(dtype), *shape, used, tensors, nullptr);
}

int activation_backward(int dtype, const ExpertsShape* shape, const int64_t* used,
                        const void* bias, const int64_t* seed, double dropout, const void* pre,
                        void* act, void* grad, void* grad_bias, void* workspace) {
  const cuda::ExpertActivation tensors{bias, seed, dropout, pre, act, grad, grad_bias};
  return cuda::expert_activation_backward(static_cast<DType>(dtype), *shape, used, tensors,
                                          workspace, nullptr);
}

int add_bias(int dtype, const ExpertsShape* shape, const int64_t* used, const void* bias,
             void* out) {
  return cuda::expert_add_bias(static_cast<DType>(dtype), *shape, used, bias, out, nullptr);
}

int add_rows(int dtype, const ExpertsShape* shape, const int64_t* used, const void* rows,
             void* sums, void* workspace) {
  return cuda::expert_add_rows(static_cast<DType>(dtype), *shape, used, rows, sums, workspace,
                               nullptr);
}

int clear_empty(int dtype, const ExpertsShape* shape, const int64_t* used, const void* rows,
                void* to) {
  return cuda::expert_clear_empty(static_cast<DType>(dtype), *shape, used, rows, to, nullptr);
}

int clear_unused(int dtype, const ExpertsShape* shape, const int64_t* used, int64_t size,
                 void* weights) {
  return cuda::expert_clear_unused(static_cast<DType>(dtype), *shape, used, size, weights,
                                   nullptr);
}

}  // extern "C"
