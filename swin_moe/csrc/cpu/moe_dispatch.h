// Expert dispatch and combine on the CPU: row gathers, forward and backward.
//
// A function computes the output rows of one range, so the caller chooses how to split them over
// threads; no two ranges write the same memory. It returns false, having read nothing out of
// bounds, when an index of its range is out of range. DType is kFloat32 or kBFloat16.
#pragma once

#include "../types.h"
#include "range.h"

namespace swin_moe::cpu {

// out[s] = x[source[s] / top_k], zeros where source[s] is -1.    Rows: slots.
bool moe_dispatch(DType dtype, const MoeShape& shape, Range rows, const void* x,
                  const int32_t* source, void* out);

// out[t] = sum over j of gate[t, j] * table[destination[t, j]].  Rows: tokens.
// This is combine, and with a null gate (all ones) the backward of dispatch.
bool moe_combine(DType dtype, const MoeShape& shape, Range rows, const void* table,
                 const float* gate, const int32_t* destination, void* out);

// grad_y[s] = gate[a] * grad_out[a / top_k] for a = source[s], zeros where a is -1;
// grad_gate[a] = <grad_out[a / top_k], y[s]>.                    Rows: slots.
bool moe_combine_backward(DType dtype, const MoeShape& shape, Range rows, const void* grad_out,
                          const void* y, const float* gate, const int32_t* source,
                          const int32_t* destination, void* grad_y, float* grad_gate);

// grad_gate[a] = 0 where destination[a] is -1: the assignments that the function above never
// meets. Also checks that each other assignment has its slot.    Rows: assignments.
bool moe_zero_dropped(const MoeShape& shape, Range rows, const int32_t* source,
                      const int32_t* destination, float* grad_gate);

}  // namespace swin_moe::cpu
