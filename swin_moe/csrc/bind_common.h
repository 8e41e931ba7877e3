// Checks and allocation that the bindings of every device share. Stable ABI only: the library
// loads in any torch from 2.11 on, and needs neither Python headers nor a rebuild per version.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "types.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has only the header-only macro
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace swin_moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType kernel_dtype(const Tensor& tensor, bool has_half) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return DType::kFloat32;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  STD_TORCH_CHECK(has_half && type == ScalarType::Half, "no kernel for dtype ", type);
  return DType::kFloat16;
}

// Returns `tensor` made contiguous, after checking its rank, its dtype and that it lives on the
// device of `like`. Expanded and strided gradients come from autograd, so they are not errors.
inline Tensor checked(const Tensor& tensor, const char* name, int64_t rank, ScalarType dtype,
                      const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimensions, not ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", not ",
                  tensor.scalar_type());
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " is on another device");
  return torch::stable::contiguous(tensor);
}

inline void check_size(const char* name, int64_t dim, int64_t size, int64_t expected) {
  STD_TORCH_CHECK(size == expected, name, " must have size ", expected, " in dimension ", dim,
                  ", not ", size);
}

inline Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}

}  // namespace swin_moe
