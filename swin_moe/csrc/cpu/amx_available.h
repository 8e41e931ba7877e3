// Whether the AMX kernels are compiled, and whether they can run.
#pragma once

#include "target.h"

// The intrinsics came with GCC 11; the permission for tile data is Linux's.
#if SWIN_MOE_X86 && defined(__linux__) && __GNUC__ >= 11
#define SWIN_MOE_AMX 1
#else
#define SWIN_MOE_AMX 0
#endif

namespace swin_moe::cpu {

// Whether processor and Linux kernel support the AMX kernels. The first call requests tile data for
// this process, which makes its signal frames 8 KiB larger: call it only to use the kernels.
bool amx_available();

}  // namespace swin_moe::cpu
