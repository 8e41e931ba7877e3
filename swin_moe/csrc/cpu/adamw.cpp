#include "adamw.h"

#include <cstring>
#include <initializer_list>

#include "target.h"
#include "window_attention.h"

namespace swin_moe::cpu {

extern const AdamwKernels kGenericAdamw;
#if SWIN_MOE_X86
extern const AdamwKernels kAvx2Adamw, kAvx512Adamw;
#endif

namespace {

const AdamwKernels* choose() {
  const WindowKernels* chosen = window_kernels(DType::kFloat32);
  if (chosen == nullptr) return nullptr;
#if SWIN_MOE_X86
  for (const AdamwKernels* kernels : {&kAvx2Adamw, &kAvx512Adamw}) {
    if (std::strcmp(chosen->name, kernels->name) == 0) return kernels;
  }
#endif
  return &kGenericAdamw;
}

}  // namespace

const AdamwKernels* adamw_kernels() {
  static const AdamwKernels* const kernels = choose();
  return kernels;
}

}  // namespace swin_moe::cpu
