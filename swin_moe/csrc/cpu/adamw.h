// AdamW with bf16 moments on a CPU, in one pass over memory. The kernel is a template in
// adamw_kernels.h, which is compiled once per instruction set in isa_*.cpp.
#pragma once

#include "../adamw.h"
#include "range.h"

namespace swin_moe::cpu {

// The kernel of one instruction set. Any thread may do any range of elements.
struct AdamwKernels {
  const char* name;
  void (*update)(const AdamwFactors&, const AdamwTensors&, Range);
};

// The kernel on this processor, chosen like those of the window attention.
const AdamwKernels* adamw_kernels();

}  // namespace swin_moe::cpu
