// Any processor: vectors of four lanes, which compilers map to SSE2 or NEON.
#include "window_kernels.h"

namespace swin_moe::cpu {
namespace {

struct Generic : Simd<4> {
  static constexpr int kRegisters = 16;
};

}  // namespace

extern const WindowKernels kGenericKernels{"generic", forward<Generic>, backward<Generic>};

}  // namespace swin_moe::cpu
