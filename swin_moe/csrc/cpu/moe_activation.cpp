#include "moe_activation.h"

#include <cstring>
#include <initializer_list>

#include "target.h"
#include "window_attention.h"

namespace swin_moe::cpu {

extern const ExpertKernels kGenericExperts;
#if SWIN_MOE_X86
extern const ExpertKernels kAvx2Experts, kAvx512Experts, kAvx512Bf16Experts;
#endif

namespace {

const ExpertKernels* choose(DType dtype) {
  const WindowKernels* chosen = window_kernels(dtype);
  if (chosen == nullptr) return nullptr;
#if SWIN_MOE_X86
  for (const ExpertKernels* kernels : {&kAvx2Experts, &kAvx512Experts, &kAvx512Bf16Experts}) {
    if (std::strcmp(chosen->name, kernels->name) == 0) return kernels;
  }
  // Nothing is multiplied here that tiles would help with.
  if (std::strcmp(chosen->name, "amx_bf16") == 0) return &kAvx512Bf16Experts;
#endif
  return &kGenericExperts;
}

}  // namespace

const ExpertKernels* expert_kernels(DType dtype) {
  static const ExpertKernels* const for_fp32 = choose(DType::kFloat32);
  static const ExpertKernels* const for_bf16 = choose(DType::kBFloat16);
  return dtype == DType::kBFloat16 ? for_bf16 : for_fp32;
}

}  // namespace swin_moe::cpu
