// Rows in shared memory and products of them, for one warp or CTA of the window attention.
#pragma once

#include <cstring>

#include "window_attention_common.cuh"

namespace swin_moe::cuda {

// ---- numbers ------------------------------------------------------------------------------------

template <typename T, int D>
struct Tile {
  static constexpr int kChunk = kVectorBytes / sizeof(T);
  static constexpr int kChunks = D / kChunk;
  static constexpr int kStride = D + kChunk;  // of rows in shared memory
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void convert(float value, float* out) { *out = value; }
__device__ __forceinline__ void convert(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void convert(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}

// Two neighbours of a row.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x;
  T y;
};

template <typename T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(from);
  return make_float2(to_float(pair.x), to_float(pair.y));
}

template <typename T>
__device__ __forceinline__ void store_pair(float x, float y, T* to) {
  Pair<T> pair;
  convert(x, &pair.x);
  convert(y, &pair.y);
  *reinterpret_cast<Pair<T>*>(to) = pair;
}

__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Sum over the four lanes that share rows.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// ---- tiles --------------------------------------------------------------------------------------

// A CTA's shared memory. `owned` tiles have 16 rows for each warp, two further ones kBlock rows.
template <typename T, int D>
struct Shared {
  static constexpr int kStride = Tile<T, D>::kStride;
  static constexpr int kBlockSize = kBlock * kStride;

  T* block[2];
  T* own[2];
  Column* columns;
  float* weights;  // of the columns, where nothing else is needed; in the same place
  Place* places;

  __device__ Shared(const Problem& p, int owned) {
    T* tiles = reinterpret_cast<T*>(dynamic_shared_memory());
    const int size = p.warps * kRows * kStride;
    block[0] = tiles;
    block[1] = tiles + kBlockSize;
    // First what is at the same distance in every launch.
    columns = reinterpret_cast<Column*>(tiles + 2 * kBlockSize);
    weights = reinterpret_cast<float*>(columns);
    own[0] = reinterpret_cast<T*>(columns + kBlock);
    own[1] = own[0] + (owned - 1) * size;
    places = reinterpret_cast<Place*>(own[1] + size);
  }

  static size_t bytes(const Problem& p, int owned) {
    const size_t rows = 2 * kBlock + owned * p.warps * kRows;
    return rows * kStride * sizeof(T) + kBlock * sizeof(Column) + p.places * sizeof(Place);
  }
};

// Starts to bring rows to shared memory, zeros where the token is padding: they have arrived after
// wait_for_copies and a barrier. `thread` is one of `threads`.
template <typename T, int D>
__device__ __forceinline__ void load_rows(T* to, const Matrix<const T>& from, const Place* places,
                                          int rows, int thread, int threads, bool aligned) {
  using Layout = Tile<T, D>;
  for (int c = thread; c < rows * Layout::kChunks; c += threads) {
    const int r = c / Layout::kChunks, d = c % Layout::kChunks * Layout::kChunk;
    const int position = places[r].position;
    const bool valid = position >= 0;
    const T* source = from.row(valid ? position : 0) + d;
    T* target = to + r * Layout::kStride + d;
    if (aligned) {
      copy_async(target, source, valid);
    } else {
      for (int i = 0; i < Layout::kChunk; ++i) {
        convert(valid ? to_float(source[i]) : 0.0f, target + i);
      }
    }
  }
}

// Brings a warp's 16 rows from shared memory; padding is not written.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const T* from, const Matrix<T>& to, const Place* places,
                                           int lane, bool aligned) {
  using Layout = Tile<T, D>;
  for (int c = lane; c < kRows * Layout::kChunks; c += kWarp) {
    const int r = c / Layout::kChunks, d = c % Layout::kChunks * Layout::kChunk;
    const int position = places[r].position;
    const T* source = from + r * Layout::kStride + d;
    if (position < 0) continue;
    if (aligned) {
      *reinterpret_cast<uint4*>(to.row(position) + d) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int i = 0; i < Layout::kChunk; ++i) to.row(position)[d + i] = source[i];
    }
  }
}

// A warp's accumulators, times a number for each of its two rows, to shared memory.
template <typename T, int D>
__device__ __forceinline__ void put_rows(const float (&sums)[D / 8][4], const float (&times)[2],
                                         T* to, int lane) {
  T* pairs = to + lane / 4 * Tile<T, D>::kStride + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      store_pair(sums[n][2 * r] * times[r], sums[n][2 * r + 1] * times[r],
                 pairs + r * 8 * Tile<T, D>::kStride + n * 8);
    }
  }
}

// How a row is normalised.
struct Norm {
  float inverse = 1.0f;  // 1 / max(norm, kMinNorm) of the row as it was
  float weight = 1.0f;   // the same of the row as it is in shared memory
  bool tiny = false;     // the norm is below kMinNorm
};

// The norm of one row in shared memory, by the four lanes of a quad, all quads of the warp at once.
// With `kRescale` the row is multiplied by a power of two that brings its norm into [1, 2).
template <typename T, int D, bool kRescale>
__device__ __forceinline__ Norm normalise(T* row, int lane) {
  T* pairs = row + lane % 4 * 2;
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const float2 value = load_pair(pairs + n * 8);
    sum += value.x * value.x + value.y * value.y;
  }
  const float norm = sqrtf(quad_sum(sum));
  Norm result;
  result.tiny = norm < kMinNorm;
  const float length = result.tiny ? kMinNorm : norm;  // a NaN stays one
  result.inverse = result.weight = 1.0f / length;
  if (!kRescale) return result;
  // The exponent's bits; with 254 and above, or a sign, the norm is not a number to scale by.
  const uint32_t exponent = __float_as_uint(length) >> 23;
  if (exponent >= 254) return result;
  const float power = __uint_as_float((254 - exponent) << 23);
  result.weight = 1.0f / (length * power);
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const float2 value = load_pair(pairs + n * 8);
    store_pair(value.x * power, value.y * power, pairs + n * 8);
  }
  return result;
}

// Where a row's norm is kept, to spare registers: in the bytes between it and the next row.
template <typename T, int D>
__device__ __forceinline__ Norm& norm_of(const T* row) {
  static_assert(sizeof(Norm) <= kVectorBytes, "it must fit between the rows");
  return *reinterpret_cast<Norm*>(const_cast<T*>(row) + D);
}

// The inner product of two rows, one in shared and one in global memory, by the lanes of a quad,
// all quads of the warp at once. 0 where there is no second row.
template <typename T, int D>
__device__ __forceinline__ float quad_dot(const T* a, const T* b, bool aligned, int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const int d = n * 8 + lane % 4 * 2;
    const float2 x = load_pair(a + d);
    if (b == nullptr) continue;
    const float2 y = aligned ? load_pair(b + d) : make_float2(to_float(b[d]), to_float(b[d + 1]));
    sum += x.x * y.x + x.y * y.y;
  }
  return quad_sum(sum);
}

// ---- scores -------------------------------------------------------------------------------------

// Column of number i of a tile of a strip.
__device__ __forceinline__ int column_of(int strip, int lane, int n, int i) {
  return strip + n * 8 + lane % 4 * 2 + i % 2;
}

// A row of probabilities among those of all windows and heads.
__device__ __forceinline__ int64_t row_of(const Problem& p, const Task& task, int i) {
  return (static_cast<int64_t>(task.window) * p.heads + task.head) * p.tokens + i;
}

// Adds the mask to a strip of the bias, whose rows are those from `first`.
template <bool kKeys>
__device__ __forceinline__ void add_mask(const Place* places, int first, int strip, int lane,
                                         Strip& bias) {
  const Place* own = places + first + lane / 4;
  const int rows[2] = {own[0].region, own[8].region};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = places[column_of(strip, lane, n, i)].region, row = rows[i / 2];
      bias[n][i] += kKeys ? mask_of(column, row) : mask_of(row, column);
    }
  }
}

// The first number of the bias that a thread has of a warp's rows.
template <bool kKeys>
__device__ __forceinline__ const float* bias_of(const Problem& p, const float* bias, int head,
                                                int first, int lane) {
  const int row = first + lane / 4, column = lane % 4 * 2;
  return bias + static_cast<int64_t>(head) * p.tokens * p.tokens +
         (kKeys ? column * p.tokens + row : row * p.tokens + column);
}

// bias[query, key] for a strip, where `bias` is of bias_of. Its rows, from `first`, are queries, or
// with `kKeys` keys. Keys beyond the window have -inf, and the mask is added. A whole strip is
// tested for it: most need none.
template <bool kPlain, bool kKeys>
__device__ __forceinline__ void load_bias(const Problem& p, const float* bias, bool masked,
                                          const Place* places, int first, int strip, int lane,
                                          Strip& values) {
  const int row = first + lane / 4, column = column_of(strip, lane, 0, 0);
  const int step = kKeys ? p.tokens : 1;
  bias += strip * step;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float* at = bias + n * 8 * step + i / 2 * 8 * (kKeys ? 1 : p.tokens);
      constexpr float kNone = kKeys ? 0.0f : -INFINITY;
      float2 pair = make_float2(kNone, kNone);
      if (!kKeys && (kPlain || p.even_bias)) {
        const bool inside = row + i * 4 < p.tokens && column + n * 8 < p.tokens;
        if (kPlain || inside) pair = load_pair(at);
      } else if (kPlain || row + i * 4 < p.tokens) {
        if (kPlain || column + n * 8 < p.tokens) pair.x = at[0];
        if (kPlain || column + n * 8 + 1 < p.tokens) pair.y = at[step];
      }
      values[n][i] = pair.x;
      values[n][i + 1] = pair.y;
    }
  }
  if (masked) add_mask<kKeys>(places, first, strip, lane, values);
}

// The weights of the two columns of a tile that the thread has.
__device__ __forceinline__ float2 weights_of(const float* weights, int strip, int lane, int n) {
  const unsigned column = strip % unsigned{kBlock} + lane % 4 * 2 + n * 8;
  return *reinterpret_cast<const float2*>(weights + column);
}

// ---- products -----------------------------------------------------------------------------------

// A warp's 16 rows in shared memory as the left factor of products.
template <typename T, int D>
struct Left {
  static constexpr int kStride = Tile<T, D>::kStride;
  uint32_t fragments[D / 16][4];

  __device__ __forceinline__ void load(const T* rows, int lane) {
    const T* row = rows + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrices(fragments[k], row + k * 16);
  }

  // products = these rows times the transpose of a strip of rows.
  __device__ __forceinline__ void multiply(Strip& products, const T* strip, int lane) const {
    const T* row = strip + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, row + n * 8 * kStride + k * 16);
        multiply_accumulate(T(), products[n], fragments[k], b[0], b[1]);
        multiply_accumulate(T(), products[n + 1], fragments[k], b[2], b[3]);
      }
    }
  }
};

__device__ __forceinline__ float fma4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// A thread has rows g and g + 8 of the left factor and, of each tile, columns 2t and 2t + 1.
template <int D>
struct Left<float, D> {
  static constexpr int kStride = Tile<float, D>::kStride;
  const float* rows;

  __device__ __forceinline__ void load(const float* from, int lane) {
    rows = from + lane / 4 * kStride;
  }

  __device__ __forceinline__ void multiply(Strip& products, const float* strip, int lane) const {
    const float* columns = strip + lane % 4 * 2 * kStride;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
    }
#pragma unroll 2
    for (int k = 0; k < D; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(rows + k);
      const float4 a1 = *reinterpret_cast<const float4*>(rows + 8 * kStride + k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b =
              *reinterpret_cast<const float4*>(columns + (n * 8 + e) * kStride + k);
          products[n][e] = fma4(a0, b, products[n][e]);
          products[n][2 + e] = fma4(a1, b, products[n][2 + e]);
        }
      }
    }
  }
};

// sums += left times a strip of rows, the left factor rounded to T. Two neighbouring tiles of
// accumulators are exactly a fragment of the left factor.
template <typename T, int D>
__device__ __forceinline__ void accumulate(float (&sums)[D / 8][4], const Strip& left,
                                           const T* strip, int lane) {
  constexpr int kStride = Tile<T, D>::kStride;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int j = 0; j < kStrip; ++j) {
      const int from = (lane & ~3) | (j % 8 / 2);  // the lane that has column j of these rows
      const float a0 = __shfl_sync(kAllLanes, left[j / 8][j % 2], from);
      const float a1 = __shfl_sync(kAllLanes, left[j / 8][2 + j % 2], from);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float2 b =
            *reinterpret_cast<const float2*>(strip + j * kStride + n * 8 + lane % 4 * 2);
        sums[n][0] = fmaf(a0, b.x, sums[n][0]);
        sums[n][1] = fmaf(a0, b.y, sums[n][1]);
        sums[n][2] = fmaf(a1, b.x, sums[n][2]);
        sums[n][3] = fmaf(a1, b.y, sums[n][3]);
      }
    }
  } else {
    const T* row = strip + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kStrip / 16; ++k) {
      const uint32_t a[4] = {pack(T(), left[2 * k][0], left[2 * k][1]),
                             pack(T(), left[2 * k][2], left[2 * k][3]),
                             pack(T(), left[2 * k + 1][0], left[2 * k + 1][1]),
                             pack(T(), left[2 * k + 1][2], left[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, row + k * 16 * kStride + n * 8);
        multiply_accumulate(T(), sums[n], a, b[0], b[1]);
        multiply_accumulate(T(), sums[n + 1], a, b[2], b[3]);
      }
    }
  }
}

}  // namespace swin_moe::cuda
