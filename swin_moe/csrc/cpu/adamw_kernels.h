// AdamW with bf16 moments on vectors of fp32 lanes: see swin_moe/ops/adamw.py for the arithmetic.
//
// Every operation is rounded by itself, so that all instruction sets give the same bits.
#pragma once

#include "adamw.h"
#include "simd_math.h"

namespace swin_moe::cpu {
namespace {

// a * b, which the compiler must not fuse with an addition: it cannot look through the statement.
template <class Isa>
SWIN_MOE_INLINE typename Isa::Float product(typename Isa::Float a, typename Isa::Float b) {
  typename Isa::Float result = a * b;
#if defined(__SSE__)
  asm("" : "+x"(result));
#elif defined(__aarch64__)
  asm("" : "+w"(result));
#else
  asm("" : "+m"(result));
#endif
  return result;
}

// Bits whose upper halves are the values, rounded to bf16 by random numbers of 16 bits. Inf stays
// inf, and a NaN is canonical: the sum could carry others into zero.
template <class Isa>
SWIN_MOE_INLINE typename Isa::Word rounded(typename Isa::Float value, typename Isa::Word random) {
  const auto nan = (typename Isa::Word)(value != value);
  return (nan & 0x7fc00000u) | (~nan & (Isa::as_word(value) + random));
}

// Updates a vector of elements, with their random numbers.
template <class Isa, class T>
SWIN_MOE_INLINE void update_lanes(const AdamwFactors& f, float* weights, const T* gradient,
                                  uint32_t* pairs, typename Isa::Word random) {
  using Float = typename Isa::Float;
  const Float g = Isa::load_row(gradient);
  const auto pair = Isa::load(pairs);
  Float first = Isa::as_float(pair & 0xffff0000u), second = Isa::as_float(pair << 16);
  first += product<Isa>(g - first, Isa::set(f.gain1));
  second = product<Isa>(second, Isa::set(f.beta2)) +
           product<Isa>(product<Isa>(g, Isa::set(f.gain2)), g);
  const Float change = product<Isa>(first, Isa::set(f.rate)) / (Isa::sqrt(second) + f.eps);
  Isa::store(product<Isa>(Isa::load(weights), Isa::set(f.decay)) - change, weights);
  Isa::store((rounded<Isa>(first, random >> 16) & 0xffff0000u) |
                 (rounded<Isa>(second, random & 0xffffu) >> 16),
             pairs);
}

// The same for the last elements, fewer than a vector has.
template <class Isa, class T>
SWIN_MOE_INLINE void update_rest(const AdamwFactors& f, float* weights, const T* gradient,
                                 uint32_t* pairs, typename Isa::Word random, int64_t count) {
  float w[Isa::kLanes] = {};
  T g[Isa::kLanes] = {};
  uint32_t p[Isa::kLanes] = {};
  std::memcpy(w, weights, count * sizeof(float));
  std::memcpy(g, gradient, count * sizeof(T));
  std::memcpy(p, pairs, count * sizeof(uint32_t));
  update_lanes<Isa>(f, w, g, p, random);
  std::memcpy(weights, w, count * sizeof(float));
  std::memcpy(pairs, p, count * sizeof(uint32_t));
}

template <class Isa, class T>
void adamw_update(const AdamwFactors& f, const AdamwTensors& tensors, Range range) {
  constexpr int64_t kRow = int64_t{1} << 32;  // elements that share a random key
  const T* gradient = static_cast<const T*>(tensors.gradient);
  typename Isa::Word lane;
  for (int i = 0; i < Isa::kLanes; ++i) lane[i] = static_cast<uint32_t>(i) * kGolden;
  for (int64_t i = range.begin; i < range.end;) {
    const int64_t row = i / kRow, next = (row + 1) * kRow;
    const int64_t end = range.end < next ? range.end : next;
    const uint32_t key = random_row(row, f.step);
    const auto random = [&](int64_t place) SWIN_MOE_LAMBDA {
      return mix(lane + (key + static_cast<uint32_t>(place) * kGolden));
    };
    for (; i + Isa::kLanes <= end; i += Isa::kLanes) {
      update_lanes<Isa>(f, tensors.weights + i, gradient + i, tensors.pairs + i, random(i));
    }
    if (i < end) {
      update_rest<Isa>(f, tensors.weights + i, gradient + i, tensors.pairs + i, random(i), end - i);
      i = end;
    }
  }
}

template <class Isa>
void adamw_for_dtype(const AdamwFactors& f, const AdamwTensors& tensors, Range range) {
  const FlushDenormals flush;
  if (tensors.dtype == DType::kBFloat16) {
    adamw_update<Isa, BFloat16>(f, tensors, range);
  } else {
    adamw_update<Isa, float>(f, tensors, range);
  }
}

// Named after the instruction set in isa_*.cpp.
template <class Isa>
constexpr AdamwKernels adamw_kernels_of(const char* name) {
  return {name, adamw_for_dtype<Isa>};
}

}  // namespace
}  // namespace swin_moe::cpu
