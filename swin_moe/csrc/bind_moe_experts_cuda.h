// The experts on CUDA: its kernels between the products, which find each expert's rows themselves.
#pragma once

#include "bind_moe_experts.h"
#include "cuda/moe_activation.h"

namespace swin_moe {

// `Stream` gives the current stream of a tensor's device.
template <typename Stream>
struct CudaExperts {
  static constexpr bool kHasHalf = true;
  static constexpr bool kHasSpans = false;  // kernels work on all rows

  static void locate(Experts& in) {
    if (in.method == Method::kChoose) in.method = choose(in);
    if (in.method == Method::kEach) count_on_host(in);
  }

  static Results forward(const Experts& in, const std::optional<Tensor>& fc2_bias, bool keep) {
    const torch::stable::accelerator::DeviceGuard guard(in.rows.get_device_index());
    switch (in.method) {
      case Method::kGrouped: return forward_grouped<CudaExperts>(in, fc2_bias, keep);
      case Method::kBatched: return forward_batched<CudaExperts>(in, fc2_bias, keep);
      default: return forward_each<CudaExperts>(in, fc2_bias, keep);
    }
  }

  static void backward(const Experts& in, const Tensor& grad_out, const Tensor& pre,
                       ExpertsGrads& grads) {
    const torch::stable::accelerator::DeviceGuard guard(in.rows.get_device_index());
    switch (in.method) {
      case Method::kGrouped: return backward_grouped<CudaExperts>(in, grad_out, pre, grads);
      case Method::kBatched: return backward_batched<CudaExperts>(in, grad_out, pre, grads);
      default: return backward_each<CudaExperts>(in, grad_out, pre, grads);
    }
  }

  static void activate(const Experts& in, const Span&, ExpertRows pre, ExpertRows act) {
    const cuda::ExpertActivation tensors = activation(in, pre.data, act.data);
    STD_CUDA_CHECK(cuda::expert_activation(in.dtype, in.shape, used(in), tensors, stream(in)));
  }

  static void activate_backward(const Experts& in, const Span&, const Tensor& pre,
                                const Tensor& grad_out, ExpertRows act, ExpertRows grad,
                                ExpertsGrads& grads) {
    cuda::ExpertActivation tensors = activation(in, pre.data_ptr(), act.data);
    tensors.grad = grad.data;
    tensors.grad_bias = grads.fc1_bias.mutable_data_ptr();
    Tensor workspace = new_workspace(in, in.shape.hidden);
    STD_CUDA_CHECK(cuda::expert_activation_backward(in.dtype, in.shape, used(in), tensors,
                                                    workspace.mutable_data_ptr(), stream(in)));
    if (grads.fc2_bias.size(0) == 0) return;
    workspace = new_workspace(in, in.shape.width);
    STD_CUDA_CHECK(cuda::expert_add_rows(in.dtype, in.shape, used(in), grad_out.const_data_ptr(),
                                         grads.fc2_bias.mutable_data_ptr(),
                                         workspace.mutable_data_ptr(), stream(in)));
  }

  static void add_bias(const Experts& in, const Span&, const Tensor& bias, Tensor& out) {
    STD_CUDA_CHECK(cuda::expert_add_bias(in.dtype, in.shape, used(in), bias.const_data_ptr(),
                                         out.mutable_data_ptr(), stream(in)));
  }

  static Tensor without_empty_rows(const Experts& in, const Tensor& rows) {
    Tensor to = torch::stable::empty_like(rows);
    STD_CUDA_CHECK(cuda::expert_clear_empty(in.dtype, in.shape, used(in), rows.const_data_ptr(),
                                            to.mutable_data_ptr(), stream(in)));
    return to;
  }

  // The kernels that add rows up write these zeros.
  static void clear_unused_biases(const Experts&, ExpertsGrads&) {}

  static void clear_unused(const Experts& in, Tensor& weights) {
    STD_CUDA_CHECK(cuda::expert_clear_unused(in.dtype, in.shape, used(in),
                                             weights.numel() / in.shape.experts,
                                             weights.mutable_data_ptr(), stream(in)));
  }

 private:
  // torch's grouped product is one kernel for bf16 only, and needs rows of whole 16 bytes. In other
  // cases, without padding, the host waits for the device to read the numbers of rows.
  static Method choose(const Experts& in) {
    if (in.shape.stride > 0) return Method::kBatched;
    const bool aligned = in.shape.width % 8 == 0 && in.shape.hidden % 8 == 0;
    return in.dtype == DType::kBFloat16 && aligned ? Method::kGrouped : Method::kEach;
  }

  static void count_on_host(Experts& in) {
    const Tensor used = torch::stable::to(
        in.used, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    find_pieces(in, used.const_data_ptr<int64_t>());
  }

  static cuda::ExpertActivation activation(const Experts& in, const void* pre, void* act) {
    return {in.fc1_bias.const_data_ptr(), in.seed_pointer(), in.dropout, pre, act, nullptr,
            nullptr};
  }

  static Tensor new_workspace(const Experts& in, int64_t width) {
    const int64_t numbers = cuda::experts_workspace(in.shape, width) / sizeof(float);
    return torch::stable::new_empty(in.rows, {numbers}, ScalarType::Float);
  }

  static const int64_t* used(const Experts& in) { return in.used.const_data_ptr<int64_t>(); }

  static cudaStream_t stream(const Experts& in) { return Stream::current(in.rows); }
};

}  // namespace swin_moe
