// The CPU kernels of the window attention for ctypes, with tile instructions that are emulated.
#include "../../swin_moe/csrc/cpu/window_attention.h"

#include <cstring>

#include "amx_emulation.h"

using swin_moe::DType;
using swin_moe::WindowOptions;
using swin_moe::WindowShape;

namespace swin_moe::cpu {
char* thread_scratch(int64_t bytes);
extern const WindowKernels kAmxBf16Kernels;
// The other instruction sets, which take long to compile, are no more than their names here.
extern const WindowKernels kGenericKernels{"generic", nullptr, nullptr};
extern const WindowKernels kAvx2Kernels{"avx2", nullptr, nullptr};
extern const WindowKernels kAvx512Kernels{"avx512", nullptr, nullptr};
extern const WindowKernels kAvx512Bf16Kernels{"avx512_bf16", nullptr, nullptr};
}  // namespace swin_moe::cpu

namespace {

namespace cpu = swin_moe::cpu;

// What kernels did not write they shall not read.
void spoil_scratch() {
  constexpr int64_t kBytes = int64_t{24} << 20;
  std::memset(cpu::thread_scratch(kBytes), 0xff, kBytes);
}

void check_released() {
  amx_emulation::require(!amx_emulation::machine().configured, "tiles are not released");
}

}  // namespace

extern "C" {

// The name of the kernels that SWIN_MOE_ISA chooses in this process, or nothing.
const char* chosen_kernels(int dtype) {
  const cpu::WindowKernels* kernels = cpu::window_kernels(static_cast<DType>(dtype));
  return kernels == nullptr ? "" : kernels->name;
}

int64_t window_groups(const WindowShape* shape) { return cpu::window_groups(*shape); }

// Units [begin, end), as a thread would.
void window_attention(const WindowShape* shape, const WindowOptions* options, const void* qkv,
                      const float* bias, const float* scale, const int64_t* seed,
                      int64_t heads_together, int64_t begin, int64_t end, void* out, float* lse) {
  spoil_scratch();
  const int64_t count = (shape->heads + heads_together - 1) / heads_together;
  const cpu::WindowForward tensors{qkv, bias, scale, seed, {heads_together, count}, out, lse};
  cpu::kAmxBf16Kernels.forward(DType::kBFloat16, *shape, *options, tensors, {begin, end});
  check_released();
}

void window_attention_backward(const WindowShape* shape, const WindowOptions* options,
                               const void* grad_out, const void* qkv, const float* bias,
                               const float* scale, const int64_t* seed, int64_t heads_together,
                               int64_t begin, int64_t end, const void* out, const float* lse,
                               void* grad_qkv, float* grad_bias, float* grad_scale) {
  spoil_scratch();
  const int64_t count = (shape->heads + heads_together - 1) / heads_together;
  const cpu::WindowBackward tensors{grad_out, qkv, bias, scale, seed, {heads_together, count},
                                    out, lse, grad_qkv, grad_bias, grad_scale};
  cpu::kAmxBf16Kernels.backward(DType::kBFloat16, *shape, *options, tensors, {begin, end});
  check_released();
}

// One product of whole tiles: c += a . b, after a configuration of the caller's.
void tile_product(const void* configuration, const void* a, const void* b, float* c) {
  const auto* row_bytes = static_cast<const uint16_t*>(configuration) + 8;
  _tile_loadconfig(configuration);
  _tile_loadd(0, c, row_bytes[0]);
  _tile_loadd(1, a, row_bytes[1]);
  _tile_loadd(2, b, row_bytes[2]);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, row_bytes[0]);
  _tile_release();
}

// Faults that end the process.
void run_faulty(int index) {
  alignas(64) uint8_t configuration[64] = {1};
  alignas(64) uint8_t data[16 * 64] = {};
  for (int tile = 0; tile < 4; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  if (index == 1) configuration[48] = 17;
  if (index == 2) configuration[16] = 68;
  if (index == 3) configuration[48] = 8;
  if (index == 4) configuration[16] = 32;
  if (index == 5) configuration[16 + 2] = 32;
  if (index == 6) configuration[48 + 5] = 1;
  if (index == 7) _tile_zero(0);
  _tile_loadconfig(configuration);
  for (int tile = 0; tile < 3; ++tile) _tile_loadd(tile, data, 64);
  if (index == 8) _tile_zero(4);
  if (index == 9) _tile_stored(0, data, 32);
  if (index == 10) _tile_loadconfig(configuration);
  if (index == 11) check_released();
  _tile_dpbf16ps(0, 1, 2);
  _tile_release();
}

}  // extern "C"
