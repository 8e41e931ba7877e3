// The CUDA kernels as torch operators, run on torch's current stream.
#define USE_CUDA  // makes torch's headers declare their CUDA functions

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "bind_adamw.h"
#include "bind_moe_dispatch.h"
#include "bind_moe_route.h"
#include "bind_moe_experts_cuda.h"
#include "bind_window_attention.h"
#include "cuda/adamw.h"
#include "cuda/moe_dispatch.h"
#include "cuda/moe_route.h"
#include "cuda/window_attention.h"

namespace swin_moe {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

struct CurrentStream {
  static cudaStream_t current(const Tensor& tensor) { return current_stream(tensor); }
};

struct Cuda {
  static constexpr bool kHasHalf = true;

  static void adamw(const AdamwFactors& factors, const AdamwTensors& tensors,
                    const Tensor& weights) {
    const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
    STD_CUDA_CHECK(cuda::adamw(factors, tensors, current_stream(weights)));
  }

  static void dispatch(DType dtype, const MoeShape& shape, const Tensor& x, const Tensor& source,
                       Tensor& out) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    STD_CUDA_CHECK(cuda::moe_dispatch(dtype, shape, x.const_data_ptr(),
                                      source.const_data_ptr<int32_t>(), out.mutable_data_ptr(),
                                      current_stream(x)));
  }

  static void combine(DType dtype, const MoeShape& shape, const Tensor& table, const float* gate,
                      const Tensor& destination, Tensor& out) {
    const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
    STD_CUDA_CHECK(cuda::moe_combine(dtype, shape, table.const_data_ptr(), gate,
                                     destination.const_data_ptr<int32_t>(),
                                     out.mutable_data_ptr(), current_stream(table)));
  }

  static void combine_backward(DType dtype, const MoeShape& shape, const Tensor& grad_out,
                               const Tensor& y, const Tensor& gate, const Tensor& source,
                               const Tensor& destination, Tensor& grad_y, Tensor& grad_gate) {
    const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
    STD_CUDA_CHECK(cuda::moe_combine_backward(
        dtype, shape, grad_out.const_data_ptr(), y.const_data_ptr(), gate.const_data_ptr<float>(),
        source.const_data_ptr<int32_t>(), destination.const_data_ptr<int32_t>(),
        grad_y.mutable_data_ptr(), grad_gate.mutable_data_ptr<float>(), current_stream(y)));
  }

  static bool route_supported(const RouteShape& shape) { return cuda::moe_route_supported(shape); }

  static void route(const RouteTensors& in, const MaybeTensor& bias, RouteResult& out) {
    const torch::stable::accelerator::DeviceGuard guard(in.logits.get_device_index());
    const int64_t bytes = cuda::moe_route_workspace(in.shape);
    Tensor workspace = torch::stable::new_empty(in.logits, {(bytes + 3) / 4});
    const cuda::RouteOutputs outputs{
        out.gate.mutable_data_ptr<float>(),          out.sums.mutable_data_ptr<float>(),
        out.scalars.mutable_data_ptr<float>(),       out.expert.mutable_data_ptr<int64_t>(),
        out.slot.mutable_data_ptr<int32_t>(),        out.source.mutable_data_ptr<int32_t>(),
        out.destination.mutable_data_ptr<int32_t>(), out.counts.mutable_data_ptr<int64_t>(),
        out.first.mutable_data_ptr<int64_t>(),       out.used.mutable_data_ptr<int64_t>()};
    STD_CUDA_CHECK(cuda::moe_route(in.shape, in.options, route_inputs(in, bias), outputs,
                                   workspace.mutable_data_ptr(), current_stream(in.logits)));
  }

  static void route_backward(const RouteTensors& in, const MaybeTensor& grad_gate,
                             const MaybeTensor& grad_sums, const MaybeTensor& grad_scalars,
                             const Tensor& expert, Tensor& grad_logits) {
    const torch::stable::accelerator::DeviceGuard guard(in.logits.get_device_index());
    const cuda::RouteGrads grads{pointer_or_null(grad_gate), pointer_or_null(grad_sums),
                                 pointer_or_null(grad_scalars)};
    STD_CUDA_CHECK(cuda::moe_route_backward(
        in.shape, in.options, grads, route_inputs(in, std::nullopt),
        expert.const_data_ptr<int64_t>(), grad_logits.mutable_data_ptr<float>(),
        current_stream(in.logits)));
  }

  static bool window_supported(DType, const WindowShape& shape) {
    return cuda::window_attention_supported(shape);
  }

  static void window_forward(const WindowInputs& in, Tensor& out, Tensor& lse) {
    const torch::stable::accelerator::DeviceGuard guard(in.qkv.get_device_index());
    STD_CUDA_CHECK(cuda::window_attention(
        in.dtype, in.shape, in.options, in.qkv.const_data_ptr(), in.bias.const_data_ptr<float>(),
        in.scale.const_data_ptr<float>(), in.seed_pointer(), out.mutable_data_ptr(),
        lse.mutable_data_ptr<float>(), current_stream(in.qkv)));
  }

  static void window_backward(const WindowInputs& in, const Tensor& grad_out, const Tensor& out,
                              const Tensor& lse, Tensor& grad_qkv, Tensor& grad_bias,
                              Tensor& grad_scale) {
    const torch::stable::accelerator::DeviceGuard guard(in.qkv.get_device_index());
    const int64_t bytes = cuda::window_attention_workspace(in.shape);
    Tensor workspace = torch::stable::new_empty(in.bias, {(bytes + 3) / 4});
    STD_CUDA_CHECK(cuda::window_attention_backward(
        in.dtype, in.shape, in.options, grad_out.const_data_ptr(), in.qkv.const_data_ptr(),
        in.bias.const_data_ptr<float>(), in.scale.const_data_ptr<float>(), in.seed_pointer(),
        out.const_data_ptr(), lse.const_data_ptr<float>(), grad_qkv.mutable_data_ptr(),
        grad_bias.mutable_data_ptr<float>(), grad_scale.mutable_data_ptr<float>(),
        workspace.mutable_data_ptr(), current_stream(in.qkv)));
  }

 private:
  static cuda::RouteInputs route_inputs(const RouteTensors& in, const MaybeTensor& bias) {
    return {in.logits.const_data_ptr<float>(), pointer_or_null(in.noise), pointer_or_null(bias)};
  }
};

}  // namespace
}  // namespace swin_moe

STABLE_TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  swin_moe::register_adamw<swin_moe::Cuda>(m);
  swin_moe::register_moe_dispatch<swin_moe::Cuda>(m);
  swin_moe::register_moe_route<swin_moe::Cuda>(m);
  swin_moe::register_moe_experts<swin_moe::CudaExperts<swin_moe::CurrentStream>>(m);
  swin_moe::register_window_attention<swin_moe::Cuda>(m);
}
