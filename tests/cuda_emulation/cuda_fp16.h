// In the place of the toolkit's header: what the kernels use of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cuda_emulation {

inline float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = std::ldexp(static_cast<float>(fraction | 1024), exponent - 25);
  if (exponent == 0) value = std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return bits & 0x8000 ? -value : value;
}

inline const std::vector<float>& halves() {
  static const std::vector<float> all = [] {
    std::vector<float> values;
    for (int bits = 0; bits < 65536; ++bits) {
      values.push_back(decode_half(static_cast<uint16_t>(bits)));
    }
    return values;
  }();
  return all;
}

// To the nearest, ties to even.
inline uint16_t encode_half(float value) {
  if (value != value) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);                  // size < 2^exponent
  const int unit = exponent < -13 ? -24 : exponent - 11;  // of the last place
  const int number = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // Carries run from the fraction into the exponent as they should.
  return sign | static_cast<uint16_t>(((unit + 24) << 10) + number);
}

}  // namespace cuda_emulation

struct __half {
  uint16_t bits;
  explicit operator float() const { return cuda_emulation::halves()[bits]; }
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return {cuda_emulation::encode_half(value)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
