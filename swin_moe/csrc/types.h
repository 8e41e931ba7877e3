// What the kernels and the bindings say to one another. No torch headers here.
#pragma once

#include <cstdint>

namespace swin_moe {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// Sizes of one dispatch or combine. An assignment is one (token, choice) pair, numbered
// token * top_k + choice.
struct MoeShape {
  int64_t tokens;
  int64_t top_k;
  int64_t slots;
  int64_t width;
};

}  // namespace swin_moe
