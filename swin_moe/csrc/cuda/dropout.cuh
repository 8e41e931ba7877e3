// Dropout by a hash of the element's place, the same in forward, backward and on every device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swin_moe::cuda {

struct Dropout {
  bool on;
  uint32_t threshold;
  float scale;  // of kept elements
};

inline Dropout make_dropout(double p) {
  const double threshold = p * 4294967296.0;
  return {p > 0.0, static_cast<uint32_t>(threshold < 4294967295.0 ? threshold : 4294967295.0),
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// The random key of row `row`, whose elements are dropped one by one.
__device__ __forceinline__ uint32_t random_row(uint64_t row, uint64_t seed) {
  const uint32_t key = mix(static_cast<uint32_t>(row) ^ static_cast<uint32_t>(seed));
  return mix(key ^ static_cast<uint32_t>(row >> 32) ^ static_cast<uint32_t>(seed >> 32));
}

// The random number of element j of a row.
__device__ __forceinline__ uint32_t random_element(uint32_t random, uint32_t j) {
  return mix(random + j * 0x9E3779B9u);
}

// The factor of element j of a row.
__device__ __forceinline__ float kept(const Dropout& dropout, uint32_t random, int j) {
  const uint32_t u = random_element(random, static_cast<uint32_t>(j));
  return u >= dropout.threshold ? dropout.scale : 0.0f;
}

}  // namespace swin_moe::cuda
