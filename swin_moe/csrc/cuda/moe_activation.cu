// A CTA does one *unit*, up to 64 rows of one expert, in 32 vectors of columns: its 8 warps take
// the rows in turn, a lane keeps to its columns. So a bias is read once and a sum over rows stays
// in registers, until the warps add theirs in shared memory. The units of an expert are added by a
// last kernel, in their order: nothing depends on which CTA is first.
//
// The host does not know the experts' numbers of rows. It launches the most units that may be
// needed; a CTA finds its own by counting through `used`, and ends if there is none.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <initializer_list>

#include "dropout.cuh"
#include "moe_activation.h"
#include "window_attention_device.cuh"

namespace swin_moe::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kUnitRows = 64;
constexpr int kBytes = 16;          // of a vector
constexpr int64_t kClearCtas = 64;  // for the weights of one expert

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  using Element = T;
  static constexpr int kSize = N;
  T values[N];
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void narrow(float value, __half* to) { *to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(value);
}

struct Unit {
  int64_t expert;
  int64_t row;
  int count;  // rows to be done
  int empty;  // rows after those that belong to the expert, too
  int64_t index;
};

__host__ __device__ inline int64_t units_of(int64_t rows) {
  return (rows + kUnitRows - 1) / kUnitRows;
}

// As many as there can be.
__host__ __device__ inline int64_t most_units(const ExpertsShape& shape) {
  if (shape.stride > 0) return shape.experts * units_of(shape.stride);
  return shape.rows / kUnitRows + shape.experts;
}

// The first unit of an expert, and how many it has.
__device__ __forceinline__ int64_t first_unit(const ExpertsShape& shape, const int64_t* used,
                                              int64_t expert) {
  if (shape.stride > 0) return expert * units_of(shape.stride);
  int64_t first = 0;
  for (int64_t e = 0; e < expert; ++e) first += units_of(used[e]);
  return first;
}

// Unit `index`; without rows if it does not exist.
__device__ __forceinline__ Unit find_unit(const ExpertsShape& shape, const int64_t* used,
                                          int64_t index) {
  if (shape.stride > 0) {
    const auto per_expert = static_cast<unsigned>(units_of(shape.stride));
    const int64_t e = static_cast<unsigned>(index) / per_expert;
    const int64_t start = (index - e * per_expert) * kUnitRows;
    assert(used[e] >= 0 && used[e] <= shape.stride);
    const int64_t left = shape.stride - start, filled = used[e] - start;
    const int rows = static_cast<int>(left < kUnitRows ? left : kUnitRows);
    const int count = filled < 0 ? 0 : filled < rows ? static_cast<int>(filled) : rows;
    return {e, e * shape.stride + start, count, rows - count, index};
  }
  int64_t row = 0, before = 0;
  for (int64_t e = 0; e < shape.experts; ++e) {
    const int64_t units = units_of(used[e]);
    assert(used[e] >= 0 && row + used[e] <= shape.rows);
    if (index < before + units) {
      const int64_t start = (index - before) * kUnitRows, left = used[e] - start;
      return {e, row + start, static_cast<int>(left < kUnitRows ? left : kUnitRows), 0, index};
    }
    row += used[e];
    before += units;
  }
  return {0, 0, 0, 0, index};
}

// 1 / x and 2^x by the special function unit, without a path for numbers that are not normal: those
// are 0. The relative error is at most 2^-23 and 2^-22, and the emulation has the whole of it.
#ifdef SWIN_MOE_CUDA_EMULATION

inline float reciprocal(float x) { return 1.0f / x * (1.0f + 0x1p-23f); }
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x) * (1.0f + 0x1p-22f); }

#else

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// F(x), and the density there: see csrc/cpu/moe_activation_kernels.h for the polynomials.
template <typename T>
__device__ __forceinline__ void normal(float x, float& below, float& density) {
  const float size = x < 0.0f ? -x : x;  // NaN stays NaN
  const float e = exp2_fast(x * x * -0.72134752f);
  float sum;
  if (sizeof(T) == 2) {
    const float p = reciprocal(0.3f * size + 1.0f);
    sum = -0.0771016742f * p + 0.216048154f;
    sum = sum * p - 0.016959014f;
    sum = sum * p + 0.144201432f;
    sum = sum * p + 0.113740846f;
    sum = (sum * p + 0.120074317f) * p;
  } else {
    const float p = reciprocal(0.35f * size + 1.0f);
    sum = -0.0291441851f * p + 0.143963833f;
    sum = sum * p - 0.255699294f;
    sum = sum * p + 0.159158539f;
    sum = sum * p - 0.0231000856f;
    sum = sum * p + 0.105504299f;
    sum = sum * p + 0.119833701f;
    sum = sum * p + 0.139861768f;
    sum = (sum * p + 0.139621409f) * p;
  }
  const float tail = sum * e;
  below = x > 0.0f ? 1.0f - tail : tail;
  density = e * 0.398942280f;
}

// Where a thread works: its unit, and its vector of columns.
struct Place {
  Unit unit;
  int64_t column;  // in vectors
  int64_t columns;
  int warp;
};

template <typename V>
__device__ __forceinline__ Place find_place(const ExpertsShape& shape, const int64_t* used,
                                            int64_t width) {
  const int64_t columns = width / V::kSize;
  const auto blocks = static_cast<unsigned>((columns + kLanes - 1) / kLanes);
  const unsigned unit = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x - unit * blocks) * kLanes + threadIdx.x % kLanes;
  return {find_unit(shape, used, unit), column, columns, static_cast<int>(threadIdx.x) / kLanes};
}

// Adds the warps' sums and writes them to the unit's row of the workspace; for all threads.
template <typename V>
__device__ __forceinline__ void write_sums(const Place& place, const float (&sums)[V::kSize],
                                           float* workspace) {
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  for (int i = 0; i < V::kSize; ++i) shared[i * kThreads + threadIdx.x] = sums[i];
  __syncthreads();
  if (place.warp > 0 || place.column >= place.columns) return;
  float* to = workspace + (place.unit.index * place.columns + place.column) * V::kSize;
  for (int i = 0; i < V::kSize; ++i) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared[i * kThreads + w * kLanes + threadIdx.x];
    to[i] = sum;
  }
}

template <typename V, bool kBackward>
__global__ void activation_kernel(ExpertsShape shape, const int64_t* used, Dropout dropout,
                                  const int64_t* seed, const V* bias, const V* pre, V* act,
                                  V* grad, float* workspace) {
  const Place place = find_place<V>(shape, used, shape.hidden);
  const Unit& unit = place.unit;
  const bool inside = place.column < place.columns;
  float sums[V::kSize] = {};
  V add = {};
  if (inside && unit.count > 0) add = bias[unit.expert * place.columns + place.column];
  for (int i = place.warp; inside && i < unit.count; i += kWarps) {
    const int64_t at = (unit.row + i) * place.columns + place.column;
    const uint32_t random = dropout.on ? random_row(unit.row + i, *seed) : 0;
    const V x = pre[at];
    V value, g = {};
    if (kBackward) g = grad[at];
#pragma unroll
    for (int k = 0; k < V::kSize; ++k) {
      const float wide = widen(x.values[k]) + widen(add.values[k]);
      float below, density;
      normal<typename V::Element>(wide, below, density);
      const int column = static_cast<int>(place.column) * V::kSize + k;
      const float keep = dropout.on ? kept(dropout, random, column) : 1.0f;
      narrow(wide * below * keep, &value.values[k]);
      if (kBackward) {
        const float slope = (below + wide * density) * keep * widen(g.values[k]);
        narrow(slope, &g.values[k]);
        sums[k] += slope;
      }
    }
    act[at] = value;
    if (kBackward) grad[at] = g;
  }
  if constexpr (kBackward) {
    for (int i = unit.count + place.warp; inside && i < unit.count + unit.empty; i += kWarps) {
      const int64_t at = (unit.row + i) * place.columns + place.column;
      act[at] = grad[at] = V{};
    }
    write_sums<V>(place, sums, workspace);
  }
}

template <typename V>
__global__ void add_bias_kernel(ExpertsShape shape, const int64_t* used, const V* bias, V* out) {
  const Place place = find_place<V>(shape, used, shape.width);
  const Unit& unit = place.unit;
  if (place.column >= place.columns || unit.count == 0) return;
  const V add = bias[unit.expert * place.columns + place.column];
  for (int i = place.warp; i < unit.count; i += kWarps) {
    V* to = out + (unit.row + i) * place.columns + place.column;
    V value = *to;
#pragma unroll
    for (int k = 0; k < V::kSize; ++k) {
      narrow(widen(value.values[k]) + widen(add.values[k]), &value.values[k]);
    }
    *to = value;
  }
}

template <typename V>
__global__ void add_rows_kernel(ExpertsShape shape, const int64_t* used, const V* rows,
                                float* workspace) {
  const Place place = find_place<V>(shape, used, shape.width);
  float sums[V::kSize] = {};
  for (int i = place.warp; place.column < place.columns && i < place.unit.count; i += kWarps) {
    const V value = rows[(place.unit.row + i) * place.columns + place.column];
#pragma unroll
    for (int k = 0; k < V::kSize; ++k) sums[k] += widen(value.values[k]);
  }
  write_sums<V>(place, sums, workspace);
}

template <typename V>
__global__ void clear_empty_kernel(ExpertsShape shape, const int64_t* used, const V* rows, V* to) {
  const Place place = find_place<V>(shape, used, shape.width);
  if (place.column >= place.columns) return;
  for (int i = place.warp; i < place.unit.count + place.unit.empty; i += kWarps) {
    const int64_t at = (place.unit.row + i) * place.columns + place.column;
    to[at] = i < place.unit.count ? rows[at] : V{};
  }
}

// A thread adds one column of the units of one expert.
template <typename T>
__global__ void add_units_kernel(ExpertsShape shape, const int64_t* used, int64_t width,
                                 const float* workspace, T* to) {
  const auto blocks = static_cast<unsigned>((width + kThreads - 1) / kThreads);
  const int64_t expert = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (column >= width) return;
  const int64_t first = first_unit(shape, used, expert), units = units_of(used[expert]);
  float sum = 0.0f;
  for (int64_t u = 0; u < units; ++u) sum += workspace[(first + u) * width + column];
  narrow(sum, to + expert * width + column);
}

template <typename V>
__global__ void clear_unused_kernel(const int64_t* used, int64_t vectors, V* weights) {
  const int64_t expert = blockIdx.x / kClearCtas;
  if (used[expert] > 0) return;
  const int64_t thread = blockIdx.x % kClearCtas * kThreads + threadIdx.x;
  for (int64_t i = thread; i < vectors; i += kClearCtas * kThreads) {
    weights[expert * vectors + i] = V{};
  }
}

// Calls `body` with the widest vector that rows of this width and these tensors allow.
template <typename Body>
cudaError_t with_vector(DType dtype, int64_t width, std::initializer_list<const void*> tensors,
                        const Body& body) {
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  bool aligned = width * element % kBytes == 0;
  for (const void* tensor : tensors) aligned &= reinterpret_cast<uintptr_t>(tensor) % kBytes == 0;
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    return aligned ? body(Vector<T, kBytes / sizeof(T)>{}) : body(Vector<T, 1>{});
  };
  switch (dtype) {
    case DType::kFloat32: return of(float{});
    case DType::kFloat16: return of(__half{});
    case DType::kBFloat16: return of(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// CTAs for every unit and every block of columns.
template <typename V>
int64_t unit_ctas(const ExpertsShape& shape, int64_t width) {
  return most_units(shape) * ((width / V::kSize + kLanes - 1) / kLanes);
}

template <typename V>
cudaError_t add_units(const ExpertsShape& shape, const int64_t* used, int64_t width,
                      const void* workspace, void* to, cudaStream_t stream) {
  using T = typename V::Element;
  return launch(add_units_kernel<T>, shape.experts * ((width + kThreads - 1) / kThreads), kThreads,
                0, stream, shape, used, width, static_cast<const float*>(workspace),
                static_cast<T*>(to));
}

template <bool kBackward>
cudaError_t activate(DType dtype, const ExpertsShape& shape, const int64_t* used,
                     const ExpertActivation& t, void* workspace, cudaStream_t stream) {
  return with_vector(dtype, shape.hidden, {t.bias, t.pre, t.act, t.grad}, [&](auto vector) {
    using V = decltype(vector);
    const size_t shared = kBackward ? sizeof(float) * V::kSize * kThreads : 0;
    const cudaError_t error =
        launch(activation_kernel<V, kBackward>, unit_ctas<V>(shape, shape.hidden), kThreads,
               shared, stream, shape, used, make_dropout(t.dropout), t.seed,
               static_cast<const V*>(t.bias), static_cast<const V*>(t.pre),
               static_cast<V*>(t.act), static_cast<V*>(t.grad), static_cast<float*>(workspace));
    if (!kBackward || error != cudaSuccess) return error;
    return add_units<V>(shape, used, shape.hidden, workspace, t.grad_bias, stream);
  });
}

}  // namespace

int64_t experts_workspace(const ExpertsShape& shape, int64_t width) {
  return most_units(shape) * width * static_cast<int64_t>(sizeof(float));
}

cudaError_t expert_activation(DType dtype, const ExpertsShape& shape, const int64_t* used,
                              const ExpertActivation& tensors, cudaStream_t stream) {
  return activate<false>(dtype, shape, used, tensors, nullptr, stream);
}

cudaError_t expert_activation_backward(DType dtype, const ExpertsShape& shape, const int64_t* used,
                                       const ExpertActivation& tensors, void* workspace,
                                       cudaStream_t stream) {
  return activate<true>(dtype, shape, used, tensors, workspace, stream);
}

cudaError_t expert_add_bias(DType dtype, const ExpertsShape& shape, const int64_t* used,
                            const void* bias, void* out, cudaStream_t stream) {
  return with_vector(dtype, shape.width, {bias, out}, [&](auto vector) {
    using V = decltype(vector);
    return launch(add_bias_kernel<V>, unit_ctas<V>(shape, shape.width), kThreads, 0, stream, shape,
                  used, static_cast<const V*>(bias), static_cast<V*>(out));
  });
}

cudaError_t expert_add_rows(DType dtype, const ExpertsShape& shape, const int64_t* used,
                            const void* rows, void* sums, void* workspace, cudaStream_t stream) {
  return with_vector(dtype, shape.width, {rows}, [&](auto vector) {
    using V = decltype(vector);
    const cudaError_t error =
        launch(add_rows_kernel<V>, unit_ctas<V>(shape, shape.width), kThreads,
               sizeof(float) * V::kSize * kThreads, stream, shape, used,
               static_cast<const V*>(rows), static_cast<float*>(workspace));
    if (error != cudaSuccess) return error;
    return add_units<V>(shape, used, shape.width, workspace, sums, stream);
  });
}

cudaError_t expert_clear_empty(DType dtype, const ExpertsShape& shape, const int64_t* used,
                               const void* rows, void* to, cudaStream_t stream) {
  return with_vector(dtype, shape.width, {rows, to}, [&](auto vector) {
    using V = decltype(vector);
    return launch(clear_empty_kernel<V>, unit_ctas<V>(shape, shape.width), kThreads, 0, stream,
                  shape, used, static_cast<const V*>(rows), static_cast<V*>(to));
  });
}

cudaError_t expert_clear_unused(DType dtype, const ExpertsShape& shape, const int64_t* used,
                                int64_t size, void* weights, cudaStream_t stream) {
  return with_vector(dtype, size, {weights}, [&](auto vector) {
    using V = decltype(vector);
    return launch(clear_unused_kernel<V>, shape.experts * kClearCtas, kThreads, 0, stream, used,
                  size / V::kSize, static_cast<V*>(weights));
  });
}

}  // namespace swin_moe::cuda
