// The operator of AdamW without the kernels of a device: checks. The semantics are in
// swin_moe/ops/adamw.py, where callers get their arguments checked with better messages.
#pragma once

#include "adamw.h"
#include "bind_common.h"

namespace swin_moe {

template <typename Device>
void adamw_(Tensor weights, Tensor gradient, Tensor pairs, int64_t step, double decay,
            double gain1, double beta2, double gain2, double rate, double eps) {
  for (const Tensor* tensor : {&weights, &pairs}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                    "weights and pairs must be contiguous and float32");
  }
  const DType dtype = kernel_dtype(gradient, false);
  for (const Tensor* tensor : {&gradient, &pairs}) {
    STD_TORCH_CHECK(tensor->numel() == weights.numel(), "weights have ", weights.numel(),
                    " elements, gradient ", gradient.numel(), ", pairs ", pairs.numel());
    STD_TORCH_CHECK(tensor->device() == weights.device(),
                    "weights, gradient and pairs must be on one device");
  }
  gradient = torch::stable::contiguous(gradient);
  const auto f = [](double value) { return static_cast<float>(value); };
  Device::adamw(
      {static_cast<uint64_t>(step), f(decay), f(gain1), f(beta2), f(gain2), f(rate), f(eps)},
      {weights.numel(), dtype, weights.mutable_data_ptr<float>(), gradient.const_data_ptr(),
       static_cast<uint32_t*>(pairs.mutable_data_ptr())},
      weights);
}

template <typename Device>
void register_adamw(torch::stable::detail::StableLibrary& m) {
  m.impl("adamw_", TORCH_BOX(&adamw_<Device>));
}

}  // namespace swin_moe
