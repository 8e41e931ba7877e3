// AdamW with bf16 moments, shared by the devices: see swin_moe/ops/adamw.py for the arithmetic.
//
// A word has both moments of an element as bf16: exp_avg in its upper half, exp_avg_sq in its lower.
#pragma once

#include <cstdint>

#include "types.h"

namespace swin_moe {

// The numbers of an update, rounded to fp32 once, so that every device computes with the same.
struct AdamwFactors {
  uint64_t step;  // number of the update, from 1 on; seeds the rounding
  float decay;    // factor of the weights
  float gain1;    // 1 - beta1
  float beta2;
  float gain2;  // 1 - beta2
  float rate;   // of exp_avg, with both bias corrections
  float eps;    // with the bias correction of exp_avg_sq
};

struct AdamwTensors {
  int64_t size;
  DType dtype;  // of the gradient: fp32 or bf16
  float* weights;
  const void* gradient;
  uint32_t* pairs;
};

}  // namespace swin_moe
