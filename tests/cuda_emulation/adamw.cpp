// The launcher of AdamW for ctypes.
#include "../../swin_moe/csrc/cuda/adamw.h"

extern "C" {

int64_t blocks_of_the_last_launch() { return gridDim.x; }

int adamw(const swin_moe::AdamwFactors* factors, int64_t size, int dtype, float* weights,
          const void* gradient, uint32_t* pairs) {
  return swin_moe::cuda::adamw(
      *factors, {size, static_cast<swin_moe::DType>(dtype), weights, gradient, pairs}, nullptr);
}

}  // extern "C"
