// Shifted-window attention on a CPU, for the binding. The kernels are templates in
// window_attention_kernels.h, compiled once per instruction set in isa_*.cpp.
#pragma once

#include "../types.h"
#include "range.h"

namespace swin_moe::cpu {

// Neighbouring heads are worked on together, window by window: a token's rows of q lie side by side
// in memory, and so do those of k and v.
struct HeadGroups {
  int64_t size;  // heads in each but the last
  int64_t count;
};
constexpr int64_t kMaxHeadsTogether = 4;

// As many heads together as keep their bias in the second cache and still leave `units` units of
// work, of `per_head` to a head. Results do not depend on it.
HeadGroups head_groups(const WindowShape& shape, int64_t per_head, int64_t units);

// Every pointer is to a contiguous tensor; T is the dtype that a call names.
struct WindowForward {
  const void* qkv;      // T [batch, height, width, 3, heads, head_dim]
  const float* bias;    // [heads, N, N]
  const float* scale;   // [heads]
  const int64_t* seed;  // [1], read if there is dropout
  HeadGroups groups;
  void* out;            // T [batch, height, width, heads * head_dim]
  float* lse;           // [windows, heads, N], log2 of the sum of 2^(logit log2 e)
};

struct WindowBackward {
  const void* grad_out;  // T, like out
  const void* qkv;
  const float* bias;
  const float* scale;
  const int64_t* seed;
  HeadGroups groups;
  const void* out;
  const float* lse;
  void* grad_qkv;     // T, like qkv
  float* grad_bias;   // [heads, groups, N, N]: a part per group of windows
  float* grad_scale;  // [heads, groups]
};

// Windows are worked on in groups whose number depends on the shape alone, and the parts of the
// groups are added in their order: gradients do not depend on the number of threads.
int64_t window_groups(const WindowShape& shape);

// The kernels of one instruction set. Units are independent, and any thread may do any range.
struct WindowKernels {
  const char* name;
  // Units: head groups x windows, head groups first, so that a thread packs a bias once.
  void (*forward)(DType, const WindowShape&, const WindowOptions&, const WindowForward&, Range);
  // Units: head groups x window groups, head groups first.
  void (*backward)(DType, const WindowShape&, const WindowOptions&, const WindowBackward&, Range);
};

// Whether kernels exist for the head width and the dtype.
bool window_attention_supported(DType dtype, const WindowShape& shape);

// The kernels for a dtype on this processor, chosen in the first call. The environment variable
// SWIN_MOE_ISA (amx_bf16, avx512_bf16, avx512, avx2, generic) selects a lesser instruction set;
// another name selects none. amx_bf16 is used only if named or allowed.
const WindowKernels* window_kernels(DType dtype);

// Lets `window_kernels` choose the kernels for AMX, where the processor has it.
void allow_amx(bool allowed);

}  // namespace swin_moe::cpu
