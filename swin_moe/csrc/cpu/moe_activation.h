// The ops between the matrix products of the experts, on a CPU: bias, GELU and dropout, their
// backward pass, and sums over rows. The kernels are templates in moe_activation_kernels.h, which
// is compiled once per instruction set in isa_*.cpp.
#pragma once

#include "../types.h"
#include "range.h"

namespace swin_moe::cpu {

// Some rows of one expert, done by one thread. Which rows share a unit depends on the shape alone,
// so sums over rows do not depend on the number of threads.
struct ExpertUnit {
  int64_t expert;
  int64_t row;         // the first one
  int64_t count;
  int64_t random_row;  // the first row's number in dropout
};
constexpr int64_t kExpertUnitRows = 64;

// T is the dtype of a call, H the hidden width.
struct ExpertActivation {
  int64_t hidden;
  const void* bias;     // T [E, H]
  const int64_t* seed;  // [1], read if there is dropout
  double dropout;
  ExpertRows pre;   // T [., H]
  ExpertRows act;   // T [., H], written; may be `pre` in the forward pass
  ExpertRows grad;  // T [., H], backward: the gradient of act on entry, that of pre on return
  float* sums;      // [units, H], backward: the rows of that gradient added up
};

// The kernels of one instruction set. Units are independent, and any thread may do any range.
struct ExpertKernels {
  const char* name;
  // act = dropout(gelu(pre + bias)).
  void (*forward)(DType, const ExpertActivation&, const ExpertUnit*, Range);
  void (*backward)(DType, const ExpertActivation&, const ExpertUnit*, Range);
  // rows[r] += bias[expert of r]; rows T [., width], bias T [E, width].
  void (*add_bias)(DType, int64_t width, const void* bias, ExpertRows rows, const ExpertUnit*,
                   Range);
  // sums[unit] = the rows of the unit added up; rows T [., width], sums [units, width].
  void (*add_rows)(DType, int64_t width, ExpertRows rows, float* sums, const ExpertUnit*, Range);
  // to[expert, columns] = sums of the units in their order; to T [width].
  void (*add_units)(DType, int64_t width, const float* sums, int64_t units, void* to);
};

// The kernels for a dtype on this processor, chosen like those of the window attention.
const ExpertKernels* expert_kernels(DType dtype);

}  // namespace swin_moe::cpu
