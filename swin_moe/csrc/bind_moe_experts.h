// The operators of the experts without the kernels of a device: checks and allocation.
//
// `Device` brings its kernels for the ops between the matrix products, and the choice of a
// method, see bind_moe_experts_cpu.h. The products are torch's, see
// bind_moe_experts_products.h. The semantics are in swin_moe/ops/moe_experts.py, where callers get
// their arguments checked with better messages.
#pragma once

#include <optional>
#include <tuple>

#include "bind_moe_experts_products.h"

namespace swin_moe {

template <typename Device>
Experts checked_experts(Tensor rows, const Tensor& used, const Tensor& fc1_weight,
                        const Tensor& fc1_bias, const Tensor& fc2_weight,
                        const std::optional<Tensor>& seed, int64_t stride, double dropout_p,
                        int64_t method) {
  const DType dtype = kernel_dtype(rows, Device::kHasHalf);
  const ScalarType type = rows.scalar_type();
  rows = checked(rows, "rows", 2, type, rows);
  Experts in{{},
             dtype,
             dropout_p,
             rows,
             checked(used, "used", 1, ScalarType::Long, rows),
             checked(fc1_weight, "fc1_weight", 3, type, rows),
             checked(fc1_bias, "fc1_bias", 2, type, rows),
             checked(fc2_weight, "fc2_weight", 3, type, rows),
             std::nullopt,
             {}};
  const int64_t experts = in.used.size(0), width = rows.size(1), hidden = in.fc1_bias.size(1);
  in.shape = {rows.size(0), experts, width, hidden, stride};
  const int64_t first[] = {experts, hidden, width}, second[] = {experts, width, hidden};
  for (int64_t dim = 0; dim < 3; ++dim) {
    check_size("fc1_weight", dim, in.fc1_weight.size(dim), first[dim]);
    check_size("fc2_weight", dim, in.fc2_weight.size(dim), second[dim]);
  }
  check_size("fc1_bias", 0, in.fc1_bias.size(0), experts);
  STD_TORCH_CHECK(stride >= 0 && experts * stride <= in.shape.rows,
                  "stride must be at least 0, and rows enough for all experts");
  STD_TORCH_CHECK(seed.has_value() || dropout_p == 0, "dropout needs a seed");
  if (dropout_p > 0) {
    in.seed = checked(*seed, "seed", 1, ScalarType::Long, rows);
    check_size("seed", 0, in.seed->size(0), 1);
  }
  in.method = static_cast<Method>(method);
  STD_TORCH_CHECK(method >= 0 && method <= 3, "there is no method ", method);
  Device::locate(in);
  return in;
}

template <typename Device>
std::tuple<Tensor, Tensor> moe_experts(Tensor rows, Tensor used, Tensor fc1_weight,
                                       Tensor fc1_bias, Tensor fc2_weight,
                                       std::optional<Tensor> fc2_bias, std::optional<Tensor> seed,
                                       int64_t stride, double dropout_p, bool keep,
                                       int64_t method) {
  Experts in = checked_experts<Device>(rows, used, fc1_weight, fc1_bias, fc2_weight, seed, stride,
                                       dropout_p, method);
  if (fc2_bias.has_value()) {
    fc2_bias = checked(*fc2_bias, "fc2_bias", 2, in.rows.scalar_type(), in.rows);
    check_size("fc2_bias", 0, fc2_bias->size(0), in.shape.experts);
    check_size("fc2_bias", 1, fc2_bias->size(1), in.shape.width);
  }
  if (in.rows.numel() == 0) {
    return {torch::stable::empty_like(in.rows),
            new_matrix(in.rows, keep ? in.shape.rows : 0, in.shape.hidden)};
  }
  const Results results = Device::forward(in, fc2_bias, keep);
  return {results.out, results.pre};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    Tensor grad_out, Tensor rows, Tensor used, Tensor fc1_weight, Tensor fc1_bias,
    Tensor fc2_weight, std::optional<Tensor> seed, Tensor pre, int64_t stride, double dropout_p,
    bool has_fc2_bias, int64_t method) {
  Experts in = checked_experts<Device>(rows, used, fc1_weight, fc1_bias, fc2_weight, seed, stride,
                                       dropout_p, method);
  const ExpertsShape& shape = in.shape;
  grad_out = checked(grad_out, "grad_out", 2, in.rows.scalar_type(), in.rows);
  check_size("grad_out", 0, grad_out.size(0), shape.rows);
  check_size("grad_out", 1, grad_out.size(1), shape.width);
  pre = checked(pre, "pre", 2, in.rows.scalar_type(), in.rows);
  check_size("pre", 0, pre.size(0), shape.rows);
  check_size("pre", 1, pre.size(1), shape.hidden);

  ExpertsGrads grads{torch::stable::empty_like(in.rows),
                     torch::stable::empty_like(in.fc1_weight),
                     torch::stable::empty_like(in.fc1_bias),
                     torch::stable::empty_like(in.fc2_weight),
                     new_matrix(in.rows, has_fc2_bias ? shape.experts : 0, shape.width)};
  if (in.rows.numel() > 0) {
    Device::backward(in, grad_out, pre, grads);
  } else {
    for (Tensor* grad : {&grads.fc1_weight, &grads.fc1_bias, &grads.fc2_weight, &grads.fc2_bias}) {
      torch::stable::zero_(*grad);
    }
  }
  return {grads.rows, grads.fc1_weight, grads.fc1_bias, grads.fc2_weight, grads.fc2_bias};
}

template <typename Device>
void register_moe_experts(torch::stable::detail::StableLibrary& m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts<Device>));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward<Device>));
}

}  // namespace swin_moe
