// The dispatch and combine operators without the kernels: checks and allocation of every device.
//
// `Device` brings `kHasHalf` and the functions `dispatch`, `combine` and `combine_backward`, which
// run its kernels on contiguous tensors of checked sizes. The semantics are in
// swin_moe/ops/moe_dispatch.py.
#pragma once

#include <limits>
#include <tuple>

#include "bind_common.h"

namespace swin_moe {

// The sizes of a plan: destination [T, k] and S slots of rows of `width`.
inline MoeShape moe_shape(const Tensor& destination, int64_t slots, int64_t width) {
  const MoeShape shape{destination.size(0), destination.size(1), slots, width};
  STD_TORCH_CHECK(shape.top_k > 0, "destination must have at least one choice per token");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(slots <= kMax && shape.tokens * shape.top_k <= kMax,
                  "indices are int32: too many slots or assignments");
  return shape;
}

inline Tensor checked_source(const Tensor& source, int64_t slots, const Tensor& like) {
  Tensor result = checked(source, "source", 1, ScalarType::Int, like);
  check_size("source", 0, result.size(0), slots);
  return result;
}

inline Tensor checked_gate(const Tensor& gate, const MoeShape& shape, const Tensor& like) {
  Tensor result = checked(gate, "gate", 2, ScalarType::Float, like);
  check_size("gate", 0, result.size(0), shape.tokens);
  check_size("gate", 1, result.size(1), shape.top_k);
  return result;
}

template <typename Device>
Tensor moe_dispatch(Tensor x, Tensor source, Tensor destination) {
  const DType dtype = kernel_dtype(x, Device::kHasHalf);
  x = checked(x, "x", 2, x.scalar_type(), x);
  destination = checked(destination, "destination", 2, ScalarType::Int, x);
  check_size("x", 0, x.size(0), destination.size(0));
  const MoeShape shape = moe_shape(destination, source.numel(), x.size(1));
  source = checked_source(source, shape.slots, x);

  Tensor out = new_matrix(x, shape.slots, shape.width);
  Device::dispatch(dtype, shape, x, source, out);
  return out;
}

template <typename Device>
Tensor moe_dispatch_backward(Tensor grad_out, Tensor destination) {
  const DType dtype = kernel_dtype(grad_out, Device::kHasHalf);
  grad_out = checked(grad_out, "grad_out", 2, grad_out.scalar_type(), grad_out);
  destination = checked(destination, "destination", 2, ScalarType::Int, grad_out);
  const MoeShape shape = moe_shape(destination, grad_out.size(0), grad_out.size(1));

  Tensor grad_x = new_matrix(grad_out, shape.tokens, shape.width);
  Device::combine(dtype, shape, grad_out, nullptr, destination, grad_x);
  return grad_x;
}

template <typename Device>
Tensor moe_combine(Tensor y, Tensor gate, Tensor source, Tensor destination) {
  const DType dtype = kernel_dtype(y, Device::kHasHalf);
  y = checked(y, "y", 2, y.scalar_type(), y);
  destination = checked(destination, "destination", 2, ScalarType::Int, y);
  const MoeShape shape = moe_shape(destination, y.size(0), y.size(1));
  source = checked_source(source, shape.slots, y);
  gate = checked_gate(gate, shape, y);

  Tensor out = new_matrix(y, shape.tokens, shape.width);
  Device::combine(dtype, shape, y, gate.const_data_ptr<float>(), destination, out);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor> moe_combine_backward(Tensor grad_out, Tensor y, Tensor gate,
                                                Tensor source, Tensor destination) {
  const DType dtype = kernel_dtype(y, Device::kHasHalf);
  y = checked(y, "y", 2, y.scalar_type(), y);
  destination = checked(destination, "destination", 2, ScalarType::Int, y);
  const MoeShape shape = moe_shape(destination, y.size(0), y.size(1));
  source = checked_source(source, shape.slots, y);
  gate = checked_gate(gate, shape, y);
  grad_out = checked(grad_out, "grad_out", 2, y.scalar_type(), y);
  check_size("grad_out", 0, grad_out.size(0), shape.tokens);
  check_size("grad_out", 1, grad_out.size(1), shape.width);

  Tensor grad_y = new_matrix(y, shape.slots, shape.width);
  Tensor grad_gate = new_matrix(gate, shape.tokens, shape.top_k);
  Device::combine_backward(dtype, shape, grad_out, y, gate, source, destination, grad_y,
                           grad_gate);
  return {grad_y, grad_gate};
}

template <typename Device>
void register_moe_dispatch(torch::stable::detail::StableLibrary& m) {
  m.impl("moe_dispatch", TORCH_BOX(&moe_dispatch<Device>));
  m.impl("moe_dispatch_backward", TORCH_BOX(&moe_dispatch_backward<Device>));
  m.impl("moe_combine", TORCH_BOX(&moe_combine<Device>));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward<Device>));
}

}  // namespace swin_moe
