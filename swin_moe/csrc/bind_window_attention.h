// The attention operators without the kernels: checks and allocation of every device.
//
// `Device` brings `kHasHalf`, `window_supported`, `window_forward` and `window_backward`, which run
// its kernels on contiguous tensors of checked sizes. The semantics are in
// swin_moe/ops/window_attention.py, where callers get their arguments checked with better messages.
#pragma once

#include <optional>
#include <tuple>

#include "bind_common.h"

namespace swin_moe {

struct WindowInputs {
  WindowShape shape;
  WindowOptions options;
  DType dtype;
  Tensor qkv;
  Tensor bias;
  Tensor scale;
  std::optional<Tensor> seed;

  const int64_t* seed_pointer() const {
    return seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr;
  }
};

template <typename Device>
WindowInputs checked_window(Tensor qkv, const Tensor& bias, const Tensor& scale,
                            const std::optional<Tensor>& seed, int64_t window_h, int64_t window_w,
                            int64_t shift_h, int64_t shift_w, bool cosine, double dropout_p) {
  const DType dtype = kernel_dtype(qkv, Device::kHasHalf);
  qkv = checked(qkv, "qkv", 6, qkv.scalar_type(), qkv);
  check_size("qkv", 3, qkv.size(3), 3);
  const WindowShape shape{qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4), qkv.size(5),
                          window_h,    window_w,    shift_h,     shift_w};
  STD_TORCH_CHECK(window_h > 0 && window_w > 0 && shift_h >= 0 && shift_h < window_h &&
                      shift_w >= 0 && shift_w < window_w,
                  "windows must have a size, and shifts be smaller than it");
  STD_TORCH_CHECK(Device::window_supported(dtype, shape), "no attention kernel for head width ",
                  shape.head_dim, " and windows of ", shape.tokens(), " tokens");
  WindowInputs inputs{shape,
                      {cosine, dropout_p},
                      dtype,
                      qkv,
                      checked(bias, "bias", 3, ScalarType::Float, qkv),
                      checked(scale, "scale", 1, ScalarType::Float, qkv),
                      std::nullopt};
  check_size("bias", 0, inputs.bias.size(0), shape.heads);
  check_size("bias", 1, inputs.bias.size(1), shape.tokens());
  check_size("bias", 2, inputs.bias.size(2), shape.tokens());
  check_size("scale", 0, inputs.scale.size(0), shape.heads);
  STD_TORCH_CHECK(seed.has_value() || dropout_p == 0, "dropout needs a seed");
  if (dropout_p > 0) {
    inputs.seed = checked(*seed, "seed", 1, ScalarType::Long, qkv);
    check_size("seed", 0, inputs.seed->size(0), 1);
  }
  return inputs;
}

template <typename Device>
std::tuple<Tensor, Tensor> window_attention(Tensor qkv, Tensor bias, Tensor scale,
                                            std::optional<Tensor> seed, int64_t window_h,
                                            int64_t window_w, int64_t shift_h, int64_t shift_w,
                                            bool cosine, double dropout_p) {
  const WindowInputs in = checked_window<Device>(qkv, bias, scale, seed, window_h, window_w,
                                                 shift_h, shift_w, cosine, dropout_p);
  const WindowShape& s = in.shape;
  Tensor out =
      torch::stable::new_empty(in.qkv, {s.batch, s.height, s.width, s.heads * s.head_dim});
  Tensor lse = torch::stable::new_empty(in.bias, {s.windows(), s.heads, s.tokens()});
  if (s.batch * s.height * s.width * s.heads > 0) Device::window_forward(in, out, lse);
  return {out, lse};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> window_attention_backward(
    Tensor grad_out, Tensor qkv, Tensor bias, Tensor scale, std::optional<Tensor> seed, Tensor out,
    Tensor lse, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w, bool cosine,
    double dropout_p) {
  const WindowInputs in = checked_window<Device>(qkv, bias, scale, seed, window_h, window_w,
                                                 shift_h, shift_w, cosine, dropout_p);
  const WindowShape& s = in.shape;
  out = checked(out, "out", 4, in.qkv.scalar_type(), in.qkv);
  grad_out = checked(grad_out, "grad_out", 4, in.qkv.scalar_type(), in.qkv);
  lse = checked(lse, "lse", 3, ScalarType::Float, in.qkv);
  const int64_t sizes[] = {s.batch, s.height, s.width, s.heads * s.head_dim};
  for (int64_t dim = 0; dim < 4; ++dim) {
    check_size("out", dim, out.size(dim), sizes[dim]);
    check_size("grad_out", dim, grad_out.size(dim), sizes[dim]);
  }
  check_size("lse", 0, lse.size(0), s.windows());
  check_size("lse", 1, lse.size(1), s.heads);
  check_size("lse", 2, lse.size(2), s.tokens());

  Tensor grad_qkv = torch::stable::empty_like(in.qkv);
  if (s.batch * s.height * s.width * s.heads == 0) {
    return {grad_qkv, torch::stable::new_zeros(in.bias, {s.heads, s.tokens(), s.tokens()}),
            torch::stable::new_zeros(in.scale, {s.heads})};
  }
  Tensor grad_bias = torch::stable::new_empty(in.bias, {s.heads, s.tokens(), s.tokens()});
  Tensor grad_scale = torch::stable::new_empty(in.scale, {s.heads});
  Device::window_backward(in, grad_out, out, lse, grad_qkv, grad_bias, grad_scale);
  return {grad_qkv, grad_bias, grad_scale};
}

template <typename Device>
void register_window_attention(torch::stable::detail::StableLibrary& m) {
  m.impl("window_attention", TORCH_BOX(&window_attention<Device>));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward<Device>));
}

}  // namespace swin_moe
