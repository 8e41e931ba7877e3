// Any processor: vectors of four lanes, which compilers map to SSE2 or NEON.
#include "adamw_kernels.h"
#include "moe_activation_kernels.h"
#include "window_kernels.h"

namespace swin_moe::cpu {
namespace {

struct Generic : Simd<4> {
  static constexpr int kRegisters = 16;
};

}  // namespace

extern const WindowKernels kGenericKernels{"generic", forward<Generic>, backward<Generic>};
extern const ExpertKernels kGenericExperts = expert_kernels_of<Generic>("generic");
extern const AdamwKernels kGenericAdamw = adamw_kernels_of<Generic>("generic");

}  // namespace swin_moe::cpu
