#include "moe_dispatch.h"

#include <cstring>

// One portable library, compiled for several instruction sets and chosen when it is loaded (needs
// glibc's indirect functions). The templates below must be inlined into such a function to be
// compiled for its instruction set.
#if defined(__x86_64__) && defined(__GLIBC__)
#define SWIN_MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SWIN_MOE_CLONES
#endif
#define SWIN_MOE_INLINE inline __attribute__((always_inline))

namespace swin_moe::cpu {
namespace {

// Columns summed at once: the fp32 accumulators of a block stay in registers or the first cache.
constexpr int64_t kBlock = 64;
// Independent partial sums of a dot product, in a fixed order for any vector width.
constexpr int64_t kLanes = 32;

struct BFloat16 {
  uint16_t bits;
};

SWIN_MOE_INLINE float to_float(float value) { return value; }

SWIN_MOE_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

SWIN_MOE_INLINE void store(float value, float* out) { *out = value; }

// Rounds to nearest, ties to even; a NaN stays a NaN.
SWIN_MOE_INLINE void store(float value, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// An index is -1 (nothing there) or in [0, size).
SWIN_MOE_INLINE bool valid(int32_t index, int64_t size) { return index >= -1 && index < size; }

template <typename T>
SWIN_MOE_INLINE void dispatch_rows(const MoeShape& shape, Range rows, const T* x,
                                   const int32_t* source, T* out) {
  for (int64_t s = rows.begin; s < rows.end; ++s) {
    T* to = out + s * shape.width;
    if (source[s] < 0) {
      std::memset(to, 0, shape.width * sizeof(T));
    } else {
      const T* from = x + (source[s] / shape.top_k) * shape.width;
      std::memcpy(to, from, shape.width * sizeof(T));
    }
  }
}

template <typename T>
SWIN_MOE_INLINE void combine_block(int64_t count, int64_t width, int64_t top_k, const T* table,
                                   const float* gate, const int32_t* destination, T* out) {
  float sum[kBlock];
  for (int64_t i = 0; i < count; ++i) sum[i] = 0.0f;
  for (int64_t j = 0; j < top_k; ++j) {
    if (destination[j] < 0) continue;
    const T* from = table + destination[j] * width;
    const float weight = gate == nullptr ? 1.0f : gate[j];
    for (int64_t i = 0; i < count; ++i) sum[i] += weight * to_float(from[i]);
  }
  for (int64_t i = 0; i < count; ++i) store(sum[i], out + i);
}

template <typename T>
SWIN_MOE_INLINE void combine_rows(const MoeShape& shape, Range rows, const T* table,
                                  const float* gate, const int32_t* destination, T* out) {
  const int64_t width = shape.width;
  const int64_t whole = width - width % kBlock;
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    const int32_t* to = destination + t * shape.top_k;
    const float* weight = gate == nullptr ? nullptr : gate + t * shape.top_k;
    T* row = out + t * width;
    for (int64_t c = 0; c < whole; c += kBlock) {
      combine_block(kBlock, width, shape.top_k, table + c, weight, to, row + c);
    }
    combine_block(width - whole, width, shape.top_k, table + whole, weight, to, row + whole);
  }
}

// Returns <grad, y> and writes weight * grad, in one pass over both rows.
template <typename T>
SWIN_MOE_INLINE float scale_and_dot(int64_t width, float weight, const T* grad, const T* y,
                                    T* out) {
  float lanes[kLanes] = {};
  const int64_t whole = width - width % kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float g = to_float(grad[c + i]);
      lanes[i] += g * to_float(y[c + i]);
      store(weight * g, out + c + i);
    }
  }
  for (int64_t c = whole; c < width; ++c) {
    const float g = to_float(grad[c]);
    lanes[c - whole] += g * to_float(y[c]);
    store(weight * g, out + c);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <typename T>
SWIN_MOE_INLINE void combine_backward_rows(const MoeShape& shape, Range rows, const T* grad_out,
                                           const T* y, const float* gate, const int32_t* source,
                                           T* grad_y, float* grad_gate) {
  const int64_t width = shape.width;
  for (int64_t s = rows.begin; s < rows.end; ++s) {
    const int64_t a = source[s];
    if (a < 0) {
      std::memset(grad_y + s * width, 0, width * sizeof(T));
    } else {
      grad_gate[a] = scale_and_dot(width, gate[a], grad_out + (a / shape.top_k) * width,
                                   y + s * width, grad_y + s * width);
    }
  }
}

bool all_valid(const int32_t* index, Range range, int64_t size) {
  bool ok = true;
  for (int64_t i = range.begin; i < range.end; ++i) ok &= valid(index[i], size);
  return ok;
}

}  // namespace

// Only bytes move, and memcpy brings its own instruction sets: no clones.
bool moe_dispatch(DType dtype, const MoeShape& shape, Range rows, const void* x,
                  const int32_t* source, void* out) {
  if (!all_valid(source, rows, shape.tokens * shape.top_k)) return false;
  if (dtype == DType::kFloat32) {
    dispatch_rows(shape, rows, static_cast<const float*>(x), source, static_cast<float*>(out));
  } else {
    dispatch_rows(shape, rows, static_cast<const BFloat16*>(x), source,
                  static_cast<BFloat16*>(out));
  }
  return true;
}

SWIN_MOE_CLONES bool moe_combine(DType dtype, const MoeShape& shape, Range rows, const void* table,
                                 const float* gate, const int32_t* destination, void* out) {
  const Range assignments{rows.begin * shape.top_k, rows.end * shape.top_k};
  if (!all_valid(destination, assignments, shape.slots)) return false;
  if (dtype == DType::kFloat32) {
    combine_rows(shape, rows, static_cast<const float*>(table), gate, destination,
                 static_cast<float*>(out));
  } else {
    combine_rows(shape, rows, static_cast<const BFloat16*>(table), gate, destination,
                 static_cast<BFloat16*>(out));
  }
  return true;
}

SWIN_MOE_CLONES bool moe_combine_backward(DType dtype, const MoeShape& shape, Range rows,
                                          const void* grad_out, const void* y, const float* gate,
                                          const int32_t* source, const int32_t* destination,
                                          void* grad_y, float* grad_gate) {
  // Two slots with the same source would write one element of grad_gate from two threads.
  for (int64_t s = rows.begin; s < rows.end; ++s) {
    if (!valid(source[s], shape.tokens * shape.top_k)) return false;
    if (source[s] >= 0 && destination[source[s]] != s) return false;
  }
  if (dtype == DType::kFloat32) {
    combine_backward_rows(shape, rows, static_cast<const float*>(grad_out),
                          static_cast<const float*>(y), gate, source, static_cast<float*>(grad_y),
                          grad_gate);
  } else {
    combine_backward_rows(shape, rows, static_cast<const BFloat16*>(grad_out),
                          static_cast<const BFloat16*>(y), gate, source,
                          static_cast<BFloat16*>(grad_y), grad_gate);
  }
  return true;
}

bool moe_zero_dropped(const MoeShape& shape, Range rows, const int32_t* source,
                      const int32_t* destination, float* grad_gate) {
  for (int64_t a = rows.begin; a < rows.end; ++a) {
    if (!valid(destination[a], shape.slots)) return false;
    if (destination[a] < 0) {
      grad_gate[a] = 0.0f;
    } else if (source[destination[a]] != a) {
      return false;
    }
  }
  return true;
}

}  // namespace swin_moe::cpu
