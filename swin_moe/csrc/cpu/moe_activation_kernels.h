// Bias, exact GELU and dropout, forward and backward, on rows of fp32 or bf16; all of it in fp32.
//
//     gelu(x) = x F(x),  gelu'(x) = F(x) + x f(x),  with the normal distribution F, density f.
//
// Both need exp(-x^2 / 2): the lower tail F(-|x|) is that times a polynomial in 1 / (1 + c |x|), so
// that its error is relative, and F(|x|) is 1 - F(-|x|).
#pragma once

#include "moe_activation.h"
#include "simd_math.h"

namespace swin_moe::cpu {
namespace {

// Minimax fits of F(-a) exp(a^2 / 2) for a in [0, 14], weighted by its inverse. The relative error
// is 3e-8 before rounding; for bf16, which is rounded to 2e-3 afterwards, 8e-6.
template <class Isa, class T>
SWIN_MOE_INLINE typename Isa::Float tail_factor(typename Isa::Float a) {
  using Float = typename Isa::Float;
  constexpr float kWide[] = {-0.0291441851f, 0.143963833f, -0.255699294f, 0.159158539f,
                             -0.0231000856f, 0.105504299f, 0.119833701f,  0.139861768f,
                             0.139621409f};
  constexpr float kShort[] = {-0.0771016742f, 0.216048154f, -0.016959014f,
                              0.144201432f,   0.113740846f, 0.120074317f};
  constexpr bool kIsShort = sizeof(T) == 2;
  constexpr int kTerms = kIsShort ? 6 : 9;
  const Float p = 1.0f / Isa::fma(a, Isa::set(kIsShort ? 0.3f : 0.35f), Isa::set(1.0f));
  Float sum = Isa::set(kIsShort ? kShort[0] : kWide[0]);
#pragma GCC unroll 9
  for (int i = 1; i < kTerms; ++i) {
    sum = Isa::fma(sum, p, Isa::set(kIsShort ? kShort[i] : kWide[i]));
  }
  return sum * p;
}

// F(x), and f(x) for those who want it. NaN gives NaN.
template <class Isa, class T>
SWIN_MOE_INLINE void normal(typename Isa::Float x, typename Isa::Float& below,
                            typename Isa::Float& density) {
  using Float = typename Isa::Float;
  const Float size = Isa::as_float(Isa::as_word(x) & 0x7fffffffu);
  const Float exponent = x * x * (-0.5f * kLog2E);
  const Float lowest = Isa::set(kLowest);
  Float e = exp2<Isa, T>(Isa::max(lowest, exponent));
  e = exponent < lowest ? Float{} : e;  // so that a large x times it is nothing
  const Float tail = tail_factor<Isa, T>(size) * e;
  below = x > 0.0f ? 1.0f - tail : tail;
  density = e * 0.398942280f;
}

// Calls `body` with vectors of columns of a row, and with its rest in `kLanes` elements.
template <class Isa, class Body>
SWIN_MOE_INLINE void for_columns(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; column + Isa::kLanes <= width; column += Isa::kLanes) body(column, Isa::kLanes);
  if (column < width) body(column, static_cast<int>(width - column));
}

template <class Isa, class T>
SWIN_MOE_INLINE typename Isa::Float load_columns(const T* from, int count) {
  if (count == Isa::kLanes) return Isa::load_row(from);
  T all[Isa::kLanes] = {};
  std::memcpy(all, from, count * sizeof(T));
  return Isa::load_row(all);
}

template <class Isa, class T>
SWIN_MOE_INLINE void store_columns(typename Isa::Float value, T* to, int count) {
  if (count == Isa::kLanes) return Isa::store_row(value, to);
  T all[Isa::kLanes];
  Isa::store_row(value, all);
  std::memcpy(to, all, count * sizeof(T));
}

template <class T>
SWIN_MOE_INLINE T* row_of(const ExpertRows& rows, int64_t row, int64_t width) {
  return static_cast<T*>(rows.data) + (row - rows.first) * width;
}

template <class Isa, class T, bool kBackward, bool kDropout>
SWIN_MOE_INLINE void activate_row(const ExpertActivation& a, const Dropout& dropout,
                                  const T* __restrict bias, int64_t row, uint32_t key,
                                  float* __restrict sums) {
  using Float = typename Isa::Float;
  const T* pre = row_of<T>(a.pre, row, a.hidden);
  T* act = row_of<T>(a.act, row, a.hidden);
  T* grad = kBackward ? row_of<T>(a.grad, row, a.hidden) : nullptr;
  for_columns<Isa>(a.hidden, [&](int64_t column, int count) SWIN_MOE_LAMBDA {
    const Float x =
        load_columns<Isa>(pre + column, count) + load_columns<Isa>(bias + column, count);
    Float below, density;
    normal<Isa, T>(x, below, density);
    Float value = x * below;
    Float slope = Isa::fma(x, density, below);
    if constexpr (kDropout) {
      const Float keep = dropout.template keep_row<Isa>(key, column);
      value *= keep;
      slope *= keep;
    }
    store_columns<Isa>(value, act + column, count);
    if constexpr (kBackward) {
      const Float g = load_columns<Isa>(grad + column, count) * slope;
      store_columns<Isa>(g, grad + column, count);
      store_columns<Isa>(load_columns<Isa>(sums + column, count) + g, sums + column, count);
    }
  });
}

template <class Isa, class T, bool kBackward, bool kDropout>
void activate(const ExpertActivation& a, const ExpertUnit* units, Range range) {
  const Dropout dropout(a.dropout, a.seed);
  for (int64_t u = range.begin; u < range.end; ++u) {
    const ExpertUnit& unit = units[u];
    const T* bias = static_cast<const T*>(a.bias) + unit.expert * a.hidden;
    float* sums = kBackward ? a.sums + u * a.hidden : nullptr;
    if constexpr (kBackward) std::memset(sums, 0, a.hidden * sizeof(float));
    for (int64_t i = 0; i < unit.count; ++i) {
      const uint32_t key = kDropout ? dropout.key(unit.random_row + i) : 0;
      activate_row<Isa, T, kBackward, kDropout>(a, dropout, bias, unit.row + i, key, sums);
    }
  }
}

// Calls `body` with a value of the element type; bf16 has the only kernels of some sets.
template <class Isa, class Body>
SWIN_MOE_INLINE void for_dtype(DType dtype, const Body& body) {
  const FlushDenormals flush;
  if constexpr (!Isa::kBf16Only) {
    if (dtype == DType::kFloat32) return body(float{});
  }
  body(BFloat16{});
}

template <class Isa, bool kBackward>
void expert_activation(DType dtype, const ExpertActivation& a, const ExpertUnit* units,
                       Range range) {
  for_dtype<Isa>(dtype, [&](auto element) {
    using T = decltype(element);
    if (a.dropout > 0) {
      activate<Isa, T, kBackward, true>(a, units, range);
    } else {
      activate<Isa, T, kBackward, false>(a, units, range);
    }
  });
}

template <class Isa>
void expert_add_bias(DType dtype, int64_t width, const void* bias, ExpertRows rows,
                     const ExpertUnit* units, Range range) {
  for_dtype<Isa>(dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t u = range.begin; u < range.end; ++u) {
      const T* add = static_cast<const T*>(bias) + units[u].expert * width;
      for (int64_t i = 0; i < units[u].count; ++i) {
        T* to = row_of<T>(rows, units[u].row + i, width);
        for_columns<Isa>(width, [&](int64_t column, int count) SWIN_MOE_LAMBDA {
          const auto sum =
              load_columns<Isa>(to + column, count) + load_columns<Isa>(add + column, count);
          store_columns<Isa>(sum, to + column, count);
        });
      }
    }
  });
}

template <class Isa>
void expert_add_rows(DType dtype, int64_t width, ExpertRows rows, float* sums,
                     const ExpertUnit* units, Range range) {
  for_dtype<Isa>(dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t u = range.begin; u < range.end; ++u) {
      float* to = sums + u * width;
      std::memset(to, 0, width * sizeof(float));
      for (int64_t i = 0; i < units[u].count; ++i) {
        const T* from = row_of<T>(rows, units[u].row + i, width);
        for_columns<Isa>(width, [&](int64_t column, int count) SWIN_MOE_LAMBDA {
          const auto sum =
              load_columns<Isa>(to + column, count) + load_columns<Isa>(from + column, count);
          store_columns<Isa>(sum, to + column, count);
        });
      }
    }
  });
}

template <class Isa>
void expert_add_units(DType dtype, int64_t width, const float* sums, int64_t units, void* to) {
  for_dtype<Isa>(dtype, [&](auto element) {
    using T = decltype(element);
    for_columns<Isa>(width, [&](int64_t column, int count) SWIN_MOE_LAMBDA {
      typename Isa::Float sum{};
      for (int64_t u = 0; u < units; ++u) {
        sum += load_columns<Isa>(sums + u * width + column, count);
      }
      store_columns<Isa>(sum, static_cast<T*>(to) + column, count);
    });
  });
}

// Named after the instruction set in isa_*.cpp.
template <class Isa>
constexpr ExpertKernels expert_kernels_of(const char* name) {
  return {name,
          expert_activation<Isa, false>,
          expert_activation<Isa, true>,
          expert_add_bias<Isa>,
          expert_add_rows<Isa>,
          expert_add_units<Isa>};
}

}  // namespace
}  // namespace swin_moe::cpu
