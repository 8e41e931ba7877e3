// Exponentials, and dropout, on vectors of fp32 lanes.
#pragma once

#include "simd.h"

namespace swin_moe::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;
// Exponents are of base 2. The power of this one is negligible and still a normal number.
constexpr float kLowest = -126.0f;

// 2^x for x >= kLowest or NaN: the nearest power of two by adding a number that leaves no room for
// a fraction, and a minimax polynomial of the rest. Relative error 8e-8, or 8e-5 for bf16, which
// is rounded to 2e-3 afterwards.
template <class Isa, class T>
SWIN_MOE_INLINE typename Isa::Float exp2(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float magic = Isa::set(12582912.0f);  // 1.5 * 2^23
  const Float shifted = x + magic;
  const Float f = x - (shifted - magic);  // in [-0.5, 0.5]
  Float p;
  if constexpr (sizeof(T) == 2) {
    p = Isa::fma(f, Isa::set(0.0551716685f), Isa::set(0.242611125f));
    p = Isa::fma(p, f, Isa::set(0.693260968f));
    p = Isa::fma(p, f, Isa::set(0.999928057f));
  } else {
    p = Isa::fma(f, Isa::set(0.00132764725f), Isa::set(0.00967554189f));
    p = Isa::fma(p, f, Isa::set(0.0555071309f));
    p = Isa::fma(p, f, Isa::set(0.240221202f));
    p = Isa::fma(p, f, Isa::set(0.693146944f));
    p = Isa::fma(p, f, Isa::set(1.00000012f));
  }
  return Isa::as_float(Isa::as_word(p) + (Isa::as_word(shifted) << 23));
}

// Dropout by a hash of the element's place, the same in forward, backward and on every device.
template <typename U>
SWIN_MOE_INLINE U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

constexpr uint32_t kGolden = 0x9e3779b9u;

// The random key of row `row`: the number of its element j is mix(key + j * kGolden).
inline uint32_t random_row(uint64_t row, uint64_t seed) {
  const uint32_t low = mix(static_cast<uint32_t>(row) ^ static_cast<uint32_t>(seed));
  return mix(low ^ static_cast<uint32_t>(row >> 32) ^ static_cast<uint32_t>(seed >> 32));
}

struct Dropout {
  uint32_t threshold = 0;
  float keep_scale = 1.0f;
  uint64_t seed = 0;

  Dropout(double probability, const int64_t* seed_pointer) {
    if (probability <= 0) return;
    const double scaled = probability * 4294967296.0;
    threshold = scaled < 4294967295.0 ? static_cast<uint32_t>(scaled) : 0xffffffffu;
    keep_scale = probability < 1 ? static_cast<float>(1 / (1 - probability)) : 0.0f;
    seed = static_cast<uint64_t>(*seed_pointer);
  }

  // The random key of row `row`, whose elements are dropped one by one.
  uint32_t key(uint64_t row) const { return random_row(row, seed); }
  // Keys of the queries of one (window, head).
  void keys(uint64_t window_and_head, int64_t tokens, uint32_t* to) const {
    for (int64_t i = 0; i < tokens; ++i) to[i] = key(window_and_head * tokens + i);
  }
  // 0 or 1 / (1 - p) for element `column` of the rows of the lanes.
  template <class Isa>
  SWIN_MOE_INLINE typename Isa::Float keep(const uint32_t* keys, int64_t column) const {
    return factor<Isa>(Isa::load(keys) + static_cast<uint32_t>(column) * kGolden);
  }
  // The same for elements `column` and following of one row.
  template <class Isa>
  SWIN_MOE_INLINE typename Isa::Float keep_row(uint32_t key, int64_t column) const {
    typename Isa::Word lane;
    for (int i = 0; i < Isa::kLanes; ++i) lane[i] = static_cast<uint32_t>(i) * kGolden;
    return factor<Isa>(lane + (key + static_cast<uint32_t>(column) * kGolden));
  }

 private:
  template <class Isa>
  SWIN_MOE_INLINE typename Isa::Float factor(typename Isa::Word place) const {
    const auto kept = (typename Isa::Word)(mix(place) >= threshold);
    return Isa::as_float(kept & Isa::as_word(Isa::set(keep_scale)));
  }
};

}  // namespace
}  // namespace swin_moe::cpu
