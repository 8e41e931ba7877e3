// x86-64 with AMX-BF16: tiles of bf16 are multiplied, the rest is that of AVX512-BF16.
#include "amx_available.h"

#if SWIN_MOE_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace swin_moe::cpu {
namespace {

// Constants of the Linux kernel's interface, which older headers lack.
constexpr long kArchRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;                   // XFEATURE_XTILEDATA

bool processor_and_kernel_have_it() {
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#if defined(SWIN_MOE_AMX_EMULATION)
  return true;
#else
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
#endif
}

}  // namespace

// Before the pragma, for this runs on every processor.
bool amx_available() {
  static const bool available = processor_and_kernel_have_it();
  return available;
}

}  // namespace swin_moe::cpu

#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,prefer-vector-width=512")
#include "amx_product.h"
#include "simd_avx512_bf16.h"
#include "window_kernels.h"

namespace swin_moe::cpu {
namespace {

struct AmxBf16 : Avx512Bf16 {
  static constexpr bool kTiles = true;
  using Session = amx::Session;
  using Product = amx::Product;
  static void multiply(const Product& product, int64_t rows, int64_t columns) {
    amx::multiply(product, rows, columns);
  }
};

}  // namespace

extern const WindowKernels kAmxBf16Kernels{"amx_bf16", forward<AmxBf16>, backward<AmxBf16>};

}  // namespace swin_moe::cpu
#endif
