// Forward: scores in registers, online softmax, dropout, product with the values. The tiling is
// explained in window_attention_common.cuh.
#include "window_attention.h"
#include "window_attention_tiles.cuh"

namespace swin_moe::cuda {
namespace {

// A thread's statistics of its two query rows, g and g + 8 of its warp's.
struct Queries {
  float scale[2];
  int region[2];
  uint32_t random[2];
  float largest[2];  // of the logits so far
  float sum[2];      // of this thread's exponentials
};

// Loads a block of keys and values to shared memory, and the factors that normalise the keys.
template <typename T, int D>
__device__ __forceinline__ void load_block(const Problem& p, const Shared<T, D>& shared,
                                           const Matrix<const T>& keys,
                                           const Matrix<const T>& values, int first) {
  const int lane = threadIdx.x % kWarp;
  const Place* places = shared.places + first;
  __syncthreads();  // the last block has been read
  load_rows<T, D>(shared.block[0], keys, places, kBlock, threadIdx.x, blockDim.x, p.aligned);
  load_rows<T, D>(shared.block[1], values, places, kBlock, threadIdx.x, blockDim.x, p.aligned);
  wait_for_copies();
  __syncthreads();
  for (int r = threadIdx.x / 4; r < kBlock; r += blockDim.x / 4) {
    T* row = shared.block[0] + r * Tile<T, D>::kStride;
    const float weight = p.cosine ? normalise<T, D, false>(row, lane).weight : 1.0f;
    if (lane % 4 == 0) shared.columns[r].weight = weight;
  }
  __syncthreads();
}

// Products become logits, in units of log2.
template <typename T, int D>
__device__ __forceinline__ void make_logits(const Problem& p, const Shared<T, D>& shared,
                                            const Queries& queries, const Strip& bias, int strip,
                                            bool masked, int lane, Strip& logits) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = column_of(strip, lane, n, i);
      const float product = logits[n][i] * queries.scale[i / 2];
      float logit = fmaf(product, shared.columns[j % kBlock].weight, bias[n][i] * kLog2E);
      if (masked) logit += mask_of(queries.region[i / 2], shared.places[j].region);
      logits[n][i] = j < p.tokens ? logit : -INFINITY;
    }
  }
}

// Logits become exponentials, relative to the largest so far; `out` is brought to that.
template <int D>
__device__ __forceinline__ void exponentiate(Queries& queries, Strip& logits,
                                             float (&out)[D / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = queries.largest[r];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      largest = fmaxf(largest, fmaxf(logits[n][2 * r], logits[n][2 * r + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    // fmaxf passes over NaNs; they come to the sum below. Nothing but -inf so far: keep 0 at 0.
    const float zero = largest == -INFINITY ? 0.0f : largest;
    const float shrink = exp2f(queries.largest[r] - zero);
    queries.largest[r] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        logits[n][i] = exp2f(logits[n][i] - zero);
        sum += logits[n][i];
      }
    }
    queries.sum[r] = queries.sum[r] * shrink + sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      out[n][2 * r] *= shrink;
      out[n][2 * r + 1] *= shrink;
    }
  }
}

__device__ __forceinline__ void drop(const Problem& p, const Queries& queries, int strip, int lane,
                                     Strip& probabilities) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = column_of(strip, lane, n, i);
      probabilities[n][i] *= kept(p.dropout, queries.random[i / 2], j);
    }
  }
}

// The factors of a warp's queries, which are in shared memory.
template <typename T, int D>
__device__ __forceinline__ Queries describe(const Problem& p, const Task& task, const Place* places,
                                            float scale, const int64_t* seed, int first, T* rows) {
  const int lane = threadIdx.x % kWarp;
  Queries queries;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    queries.scale[r] = scale * kLog2E;
    if (p.cosine) {
      queries.scale[r] *= normalise<T, D, false>(rows + row * Tile<T, D>::kStride, lane).weight;
    }
    queries.region[r] = places[row].region;
    queries.random[r] = p.dropout.on ? random_row(row_of(p, task, first + row), *seed) : 0;
    queries.largest[r] = -INFINITY;
    queries.sum[r] = 0.0f;
  }
  return queries;
}

// Divides the sums by those of the exponentials and writes the rows, through shared memory so that
// they are stored as vectors, and lse.
template <typename T, int D>
__device__ __forceinline__ void finish(const Problem& p, const Task& task, const Queries& queries,
                                       const float (&sums)[D / 8][4], const Place* places,
                                       int first, T* rows, const Matrix<T>& out, float* lse) {
  const int lane = threadIdx.x % kWarp;
  float times[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = first + lane / 4 + r * 8;
    const float sum = quad_sum(queries.sum[r]);
    times[r] = 1.0f / sum;
    if (lane % 4 == 0 && i < p.tokens) {
      lse[row_of(p, task, i)] = queries.largest[r] + log2f(sum);
    }
  }
  __syncwarp();  // the rows of queries have been read
  put_rows<T, D>(sums, times, rows, lane);
  __syncwarp();
  store_rows<T, D>(rows, out, places, lane, p.aligned);
}

template <typename T, int D>
__global__ void __launch_bounds__(kMaxWarps<T> * kWarp)
    forward_kernel(Problem p, const T* __restrict__ qkv, const float* __restrict__ bias,
                   const float* __restrict__ scale, const int64_t* __restrict__ seed,
                   T* __restrict__ out, float* __restrict__ lse) {
  const Task task = task_of(p, blockIdx.x);
  const Shared<T, D> shared(p, 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool masked = list_places(p, task.window, shared.places);

  const int first = (task.block * p.warps + warp) * kRows;
  const Place* places = shared.places + first;
  T* rows = shared.own[0] + warp * kRows * Tile<T, D>::kStride;
  const auto q = matrix_of(p, qkv, task.window, task.head, D, 0, 3);
  const auto k = matrix_of(p, qkv, task.window, task.head, D, 1, 3);
  const auto v = matrix_of(p, qkv, task.window, task.head, D, 2, 3);
  load_rows<T, D>(rows, q, places, kRows, lane, kWarp, p.aligned);
  load_block<T, D>(p, shared, k, v, 0);  // queries arrive along with it
  Queries queries =
      describe<T, D>(p, task, places, factor_of(p, scale[task.head]), seed, first, rows);
  Left<T, D> left;
  left.load(rows, lane);

  float sums[D / 8][4] = {};
  for (int block = 0; block < p.tokens; block += kBlock) {
    if (block > 0) load_block<T, D>(p, shared, k, v, block);
    for (int strip = block; strip < block + kBlock && strip < p.tokens; strip += kStrip) {
      const int offset = (strip - block) * Tile<T, D>::kStride;
      Strip bias_strip, scores;
      load_bias<false>(p, bias, task.head, first, strip, lane, bias_strip);
      left.multiply(scores, shared.block[0] + offset, lane);
      make_logits<T, D>(p, shared, queries, bias_strip, strip, masked, lane, scores);
      exponentiate<D>(queries, scores, sums);
      if (p.dropout.on) drop(p, queries, strip, lane, scores);
      accumulate<T, D>(sums, scores, shared.block[1] + offset, lane);
    }
  }
  finish<T, D>(p, task, queries, sums, places, first, rows,
               matrix_of(p, out, task.window, task.head, D, 0, 1), lse);
}

}  // namespace

bool window_attention_supported(const WindowShape& shape) {
  const int64_t tokens = shape.tokens();
  const bool shifts = shape.shift_h >= 0 && shape.shift_h < shape.window_h &&
                      shape.shift_w >= 0 && shape.shift_w < shape.window_w;
  if (shape.head_dim % 16 != 0 || shape.head_dim < 16 || shape.head_dim > 64 || !shifts ||
      tokens > kMaxTokens) {
    return false;
  }
  const int64_t blocks = ceil_div(ceil_div(tokens, kRows), kMaxWarps<float>);
  return shape.height * shape.width <= kMaxGrid &&
         shape.windows() * shape.heads * blocks <= kMaxGrid;
}

cudaError_t window_attention(DType dtype, const WindowShape& shape, const WindowOptions& options,
                             const void* qkv, const float* bias, const float* scale,
                             const int64_t* seed, void* out, float* lse, cudaStream_t stream) {
  if (!window_attention_supported(shape)) return cudaErrorInvalidValue;
  if (shape.windows() == 0 || shape.heads == 0) return cudaSuccess;
  return launch_for(dtype, shape.head_dim, [&](auto number, auto head_dim) {
    using T = decltype(number);
    constexpr int D = decltype(head_dim)::value;
    const Problem p = make_problem(shape, options, kMaxWarps<T>, bias, {qkv, out});
    const int64_t grid = static_cast<int64_t>(p.windows) * p.blocks * p.heads;
    return launch(forward_kernel<T, D>, grid, p.warps * kWarp, Shared<T, D>::bytes(p, 1), stream, p,
                  static_cast<const T*>(qkv), bias, scale, seed, static_cast<T*>(out), lse);
  });
}

}  // namespace swin_moe::cuda
