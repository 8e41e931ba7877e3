// The launchers of the window attention for ctypes.
#include "../../swin_moe/csrc/cuda/window_attention.h"
#include "../../swin_moe/csrc/cuda/window_attention_common.cuh"

using swin_moe::DType;
using swin_moe::WindowOptions;
using swin_moe::WindowShape;

extern "C" {

bool window_attention_supported(const WindowShape* shape) {
  return swin_moe::cuda::window_attention_supported(*shape);
}

int64_t window_attention_workspace(const WindowShape* shape) {
  return swin_moe::cuda::window_attention_workspace(*shape);
}

int window_attention(int dtype, const WindowShape* shape, const WindowOptions* options,
                     const void* qkv, const float* bias, const float* scale, const int64_t* seed,
                     void* out, float* lse) {
  return swin_moe::cuda::window_attention(static_cast<DType>(dtype), *shape, *options, qkv, bias,
                                          scale, seed, out, lse, nullptr);
}

int window_attention_backward(int dtype, const WindowShape* shape, const WindowOptions* options,
                              const void* grad_out, const void* qkv, const float* bias,
                              const float* scale, const int64_t* seed, const void* out,
                              const float* lse, void* grad_qkv, float* grad_bias,
                              float* grad_scale, void* workspace) {
  return swin_moe::cuda::window_attention_backward(
      static_cast<DType>(dtype), *shape, *options, grad_out, qkv, bias, scale, seed, out, lse,
      grad_qkv, grad_bias, grad_scale, workspace, nullptr);
}

// Whether the plain instances are to run on these addresses.
bool window_attention_plain(const WindowShape* shape, const WindowOptions* options,
                            const float* bias, const void* tensor) {
  return swin_moe::cuda::make_problem(*shape, *options, 8, 1, bias, {tensor}).plain;
}

int window_attention_quotient(int64_t number, int a) {
  return swin_moe::cuda::make_divisor(number).quotient(a);
}

}  // extern "C"
