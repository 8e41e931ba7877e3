// Elementary functions for loops over lanes, each right to about one part in 10^7 in its domain.
//
// Compilers vectorise a loop of them only if it has no branch, and they branch on a comparison of a
// float with a constant, to fold the constant's results. So numbers are clamped and selected as
// integers here: numbers of one sign are in the order of their bits.
#pragma once

#include <cstdint>
#include <cstring>

#define SWIN_MOE_INLINE inline __attribute__((always_inline))

namespace swin_moe::cpu {
namespace {

SWIN_MOE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SWIN_MOE_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The larger of a number that is not negative and a positive one.
SWIN_MOE_INLINE float at_least(float x, float positive) {
  const uint32_t bits = bits_of(x), least = bits_of(positive);
  return float_of(bits > least ? bits : least);
}

// The larger of a number that is not positive and a negative one.
SWIN_MOE_INLINE float not_below(float x, float negative) {
  const uint32_t bits = bits_of(x), most = bits_of(negative);
  return float_of(bits < most ? bits : most);
}

SWIN_MOE_INLINE float minus_abs(float x) { return float_of(bits_of(x) | 0x80000000u); }

// a if x has a minus sign, otherwise b.
SWIN_MOE_INLINE float by_sign(float x, float a, float b) {
  const uint32_t mask = 0u - (bits_of(x) >> 31);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

SWIN_MOE_INLINE float larger(float a, float b) { return a > b ? a : b; }
SWIN_MOE_INLINE float smaller(float a, float b) { return a < b ? a : b; }

// ln 2 in two parts, the first of few bits: its products with small integers are exact.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// From kLeastExp, where it is 0, to 88.
constexpr float kLeastExp = -104.0f;
SWIN_MOE_INLINE float exp_lane(float x) {
  constexpr float kRound = 12582912.0f;  // adding it leaves an integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * kLn2High - n * kLn2Low;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  // 2^n as two factors, for 2^-150 is no fp32 number.
  const int32_t whole = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const int32_t half = whole >> 1;
  const float scale = float_of((static_cast<uint32_t>(half) + 127u) << 23);
  return y * scale * float_of((static_cast<uint32_t>(whole - half) + 127u) << 23);
}

// For positive normal numbers.
SWIN_MOE_INLINE float log_lane(float x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3u, kOne = 0x3f800000u;
  const uint32_t bits = bits_of(x) + (kOne - kRootHalf);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float f = float_of((bits & 0x007fffffu) + kRootHalf) - 1.0f;  // root of 1/2 to root of 2
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const float square = f * f;
  y = y * f * square + exponent * kLn2Low - 0.5f * square;
  return f + y + exponent * kLn2High;
}

// A rational minimax approximation; beyond 4 the result is 1 in fp32.
SWIN_MOE_INLINE float erf_lane(float x) {
  x = by_sign(x, not_below(minus_abs(x), -4.0f), -not_below(minus_abs(x), -4.0f));
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

}  // namespace
}  // namespace swin_moe::cpu
