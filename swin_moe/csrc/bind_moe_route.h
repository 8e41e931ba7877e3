// The routing operators without the kernels: checks and allocation of every device.
//
// `Device` brings the functions `route_supported`, `route` and `route_backward`, which run its
// kernels on contiguous tensors of checked sizes. The semantics are in swin_moe/ops/moe_route.py,
// where callers get their arguments checked with better messages.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "bind_common.h"

namespace swin_moe {

using MaybeTensor = std::optional<Tensor>;

inline const float* pointer_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

struct RouteTensors {
  RouteShape shape;
  RouteOptions options;
  Tensor logits;
  MaybeTensor noise;
};

// The results of a routing in the order of the schema: differentiable ones, then integers.
struct RouteResult {
  Tensor gate, sums, scalars, expert, slot, source, destination, counts, first, used;
};

// An empty optional stays one; otherwise it is checked by `checked`, and for its sizes.
inline MaybeTensor checked_floats(const MaybeTensor& tensor, const char* name, const Tensor& like,
                                  std::initializer_list<int64_t> sizes) {
  if (!tensor.has_value()) return std::nullopt;
  const auto rank = static_cast<int64_t>(sizes.size());
  Tensor result = checked(*tensor, name, rank, ScalarType::Float, like);
  int64_t dim = 0;
  for (int64_t size : sizes) {
    check_size(name, dim, result.size(dim), size);
    ++dim;
  }
  return result;
}

template <typename Device>
RouteTensors checked_route(const Tensor& logits, const MaybeTensor& noise, int64_t top_k,
                           bool sigmoid, bool normalize, bool prioritized, int64_t groups,
                           int64_t capacity, bool padded, double load_sigma) {
  RouteTensors in{{},
                  {sigmoid, normalize, prioritized, static_cast<float>(load_sigma)},
                  checked(logits, "logits", 2, ScalarType::Float, logits),
                  std::nullopt};
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  in.shape = {tokens, experts, top_k, groups, capacity, padded};
  STD_TORCH_CHECK(top_k > 0 && top_k <= experts, "top_k must be between 1 and the experts");
  STD_TORCH_CHECK(groups > 0 && tokens % groups == 0, "groups must divide the tokens");
  STD_TORCH_CHECK(capacity >= 0 && (capacity > 0 || !padded), "padded rows need a capacity");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(experts <= kMax && tokens <= kMax / experts && capacity <= kMax &&
                      groups * experts <= kMax / std::max<int64_t>(capacity, 1),
                  "indices are int32: too many tokens, experts or places");
  STD_TORCH_CHECK(Device::route_supported(in.shape), "no routing kernel for ", experts, " experts");
  in.noise = checked_floats(noise, "noise", logits, {tokens, experts});
  return in;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
moe_route(Tensor logits, MaybeTensor noise, MaybeTensor bias, int64_t top_k, bool sigmoid,
          bool normalize, bool prioritized, int64_t groups, int64_t capacity, bool padded,
          double load_sigma) {
  const RouteTensors in = checked_route<Device>(logits, noise, top_k, sigmoid, normalize,
                                                prioritized, groups, capacity, padded, load_sigma);
  const int64_t T = in.shape.tokens, E = in.shape.experts;
  bias = checked_floats(bias, "bias", in.logits, {E});
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(in.logits, sizes, dtype);
  };
  RouteResult out{empty({T, top_k}, ScalarType::Float),
                  empty({3, E}, ScalarType::Float),
                  empty({kRouteScalars}, ScalarType::Float),
                  empty({T, top_k}, ScalarType::Long),
                  empty({T, top_k}, ScalarType::Int),
                  empty({in.shape.rows()}, ScalarType::Int),
                  empty({T, top_k}, ScalarType::Int),
                  empty({E}, ScalarType::Long),
                  empty({E}, ScalarType::Long),
                  empty({E}, ScalarType::Long)};
  Device::route(in, bias, out);
  return {out.gate,   out.sums,        out.scalars, out.expert, out.slot,
          out.source, out.destination, out.counts,  out.first,  out.used};
}

template <typename Device>
Tensor moe_route_backward(MaybeTensor grad_gate, MaybeTensor grad_sums, MaybeTensor grad_scalars,
                          Tensor logits, MaybeTensor noise, Tensor expert, int64_t top_k,
                          bool sigmoid, bool normalize, bool prioritized, int64_t groups,
                          int64_t capacity, bool padded, double load_sigma) {
  const RouteTensors in = checked_route<Device>(logits, noise, top_k, sigmoid, normalize,
                                                prioritized, groups, capacity, padded, load_sigma);
  const int64_t T = in.shape.tokens, E = in.shape.experts;
  expert = checked(expert, "expert", 2, ScalarType::Long, in.logits);
  check_size("expert", 0, expert.size(0), T);
  check_size("expert", 1, expert.size(1), top_k);
  grad_gate = checked_floats(grad_gate, "grad_gate", in.logits, {T, top_k});
  grad_sums = checked_floats(grad_sums, "grad_sums", in.logits, {3, E});
  grad_scalars = checked_floats(grad_scalars, "grad_scalars", in.logits, {kRouteScalars});
  Tensor grad_logits = new_matrix(in.logits, T, E);
  Device::route_backward(in, grad_gate, grad_sums, grad_scalars, expert, grad_logits);
  return grad_logits;
}

template <typename Device>
void register_moe_route(torch::stable::detail::StableLibrary& m) {
  m.impl("moe_route", TORCH_BOX(&moe_route<Device>));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward<Device>));
}

}  // namespace swin_moe
