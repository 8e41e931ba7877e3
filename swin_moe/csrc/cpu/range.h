#pragma once

#include <cstdint>

namespace swin_moe::cpu {

// The part [begin, end) of a loop that one thread does.
struct Range {
  int64_t begin;
  int64_t end;
};

}  // namespace swin_moe::cpu
