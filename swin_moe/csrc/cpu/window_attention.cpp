#include "window_attention.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "amx_available.h"
#include "target.h"
#include "window_tiles.h"

namespace swin_moe::cpu {

extern const WindowKernels kGenericKernels;
#if SWIN_MOE_X86
extern const WindowKernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
#endif
#if SWIN_MOE_AMX
extern const WindowKernels kAmxBf16Kernels;
#endif

namespace {

constexpr int64_t kWindowsPerGroup = 16;
constexpr int64_t kSecondCache = int64_t{2} << 20;
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;  // of the bias gradient

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

struct Choice {
  const WindowKernels* kernels;
  bool available;
};

std::atomic<bool> amx_allowed{false};

// None for a wish that names nothing. The kernels for AMX need permission, or the wish for them:
// they have not run on a processor with AMX yet, and a trial comes first.
const WindowKernels* choose(bool has_bf16_dot, bool amx) {
  const char* wish = std::getenv("SWIN_MOE_ISA");
  const Choice choices[] = {
#if SWIN_MOE_AMX
      {&kAmxBf16Kernels,
       has_bf16_dot &&
           (amx || (wish != nullptr && std::strcmp(wish, kAmxBf16Kernels.name) == 0)) &&
           amx_available()},
#endif
#if SWIN_MOE_X86
      {&kAvx512Bf16Kernels, has_bf16_dot && __builtin_cpu_supports("avx512bf16")},
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kGenericKernels, true},
  };
  bool reached = wish == nullptr;
  for (const Choice& choice : choices) {
    reached |= wish != nullptr && std::strcmp(wish, choice.kernels->name) == 0;
    if (reached && choice.available) return choice.kernels;
  }
  return nullptr;
}

}  // namespace

char* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    memory.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 4096))));
    if (memory == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

HeadGroups head_groups(const WindowShape& shape, int64_t per_head, int64_t units) {
  const int64_t bytes = 2 * 4 * shape.tokens() * shape.tokens();  // the bias and its gradient
  int64_t size = kSecondCache / bytes;
  if (size > shape.heads * per_head / units) size = shape.heads * per_head / units;
  size = size < 1 ? 1 : size > kMaxHeadsTogether ? kMaxHeadsTogether : size;
  const int64_t count = (shape.heads + size - 1) / size;
  return {(shape.heads + count - 1) / count, count};
}

int64_t window_groups(const WindowShape& shape) {
  const int64_t windows = shape.windows(), n = shape.tokens();
  const int64_t most = kMaxPartialBytes / (shape.heads * n * n * 4);
  int64_t groups = (windows + kWindowsPerGroup - 1) / kWindowsPerGroup;
  if (groups > most) groups = most;
  return groups > 0 ? groups : 1;
}

bool window_attention_supported(DType dtype, const WindowShape& shape) {
  const int64_t d = shape.head_dim;
  return dtype != DType::kFloat16 && (d == 16 || d == 32 || d == 48 || d == 64);
}

const WindowKernels* window_kernels(DType dtype) {
  static const WindowKernels* const for_fp32 = choose(false, false);
  static const WindowKernels* const for_bf16 = choose(true, false);
  if (dtype != DType::kBFloat16) return for_fp32;
  if (!amx_allowed) return for_bf16;
  static const WindowKernels* const with_amx = choose(true, true);
  return with_amx;
}

void allow_amx(bool allowed) { amx_allowed = allowed; }

}  // namespace swin_moe::cpu
