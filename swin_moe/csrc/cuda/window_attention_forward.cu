// Forward: scores in registers, online softmax, dropout, product with the values. The tiling is
// explained in window_attention_common.cuh.
#include "window_attention.h"
#include "window_attention_tiles.cuh"

namespace swin_moe::cuda {
namespace {

// A thread's statistics of its two query rows, g and g + 8 of its warp's.
struct Queries {
  float scale[2];
  uint32_t random[2];
  float largest[2];  // of the logits so far, in units of log2
  float sum[2];      // of this thread's exponentials
};

// Loads a block of keys and values to shared memory, and the factors that normalise the keys.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void load_block(const Problem& p, const Shared<T, D>& shared,
                                           const Matrix<const T>& keys,
                                           const Matrix<const T>& values, int first) {
  const int lane = threadIdx.x % kWarp;
  const Place* places = shared.places + first;
  __syncthreads();  // the last block has been read
  const bool aligned = kPlain || p.aligned;
  load_rows<T, D>(shared.block[0], keys, places, kBlock, threadIdx.x, blockDim.x, aligned);
  load_rows<T, D>(shared.block[1], values, places, kBlock, threadIdx.x, blockDim.x, aligned);
  wait_for_copies();
  __syncthreads();
  for (int r = threadIdx.x / 4; r < kBlock; r += blockDim.x / 4) {
    T* row = shared.block[0] + r * Tile<T, D>::kStride;
    const float weight = p.cosine ? normalise<T, D, false>(row, lane).weight : 1.0f;
    if (lane % 4 == 0) shared.weights[r] = weight;
  }
  __syncthreads();
}

// Products become logits.
template <typename T, int D>
__device__ __forceinline__ void make_logits(const Shared<T, D>& shared,
                                            const Queries& queries, const Strip& bias, int strip,
                                            int lane, Strip& logits) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float2 weights = weights_of(shared.weights, strip, lane, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float product = logits[n][i] * queries.scale[i / 2];
      logits[n][i] = fmaf(product, i % 2 == 0 ? weights.x : weights.y, bias[n][i]);
    }
  }
}

// Logits become exponentials, relative to the largest so far; `out` is brought to that.
template <int D>
__device__ __forceinline__ void exponentiate(Queries& queries, Strip& logits,
                                             float (&out)[D / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      largest = fmaxf(largest, fmaxf(logits[n][2 * r], logits[n][2 * r + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    largest = fmaxf(queries.largest[r], largest * kLog2E);
    // fmaxf passes over NaNs; they come to the sum below. Nothing but -inf so far: keep 0 at 0.
    const float zero = largest == -INFINITY ? 0.0f : largest;
    const float shrink = exp2_flushed(queries.largest[r] - zero);
    queries.largest[r] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        logits[n][i] = exp2_flushed(fmaf(logits[n][i], kLog2E, -zero));
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
template <typename T, int D, bool kPlain>
__device__ __forceinline__ Queries describe(const Problem& p, const Task& task, float scale,
                                            const int64_t* seed, int first, T* rows) {
  const int lane = threadIdx.x % kWarp;
  Queries queries;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    queries.scale[r] = scale;
    if (p.cosine) {
      queries.scale[r] *= normalise<T, D, false>(rows + row * Tile<T, D>::kStride, lane).weight;
    }
    const bool drops = !kPlain && p.dropout.on;
    queries.random[r] = drops ? random_row(row_of(p, task, first + row), *seed) : 0;
    queries.largest[r] = -INFINITY;
    queries.sum[r] = 0.0f;
  }
  return queries;
}

// Divides the sums by those of the exponentials and writes the rows, through shared memory so that
// they are stored as vectors, and lse.
template <typename T, int D, bool kPlain>
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
    if (lane % 4 == 0 && (kPlain || i < p.tokens)) {
      lse[row_of(p, task, i)] = queries.largest[r] + log2f(sum);
    }
  }
  __syncwarp();  // the rows of queries have been read
  put_rows<T, D>(sums, times, rows, lane);
  __syncwarp();
  store_rows<T, D>(rows, out, places, lane, kPlain || p.aligned);
}

// CTAs of an SM for which the registers must suffice.
template <int D, bool kPlain>
constexpr int kCtas = D <= 32 && kPlain ? 2 : 1;

template <typename T, int D, bool kPlain>
__global__ void __launch_bounds__(kMaxWarps<T> * kWarp, kCtas<D, kPlain>)
    forward_kernel(Problem p, const T* __restrict__ qkv, const float* __restrict__ bias,
                   const float* __restrict__ scale, const int64_t* __restrict__ seed,
                   T* __restrict__ out, float* __restrict__ lse) {
  const Task task = task_of(p, blockIdx.x);
  const Shared<T, D> shared(p, 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool masked = list_places(p, task.window, shared.places);

  const int first = (task.block * p.tiles + warp) * kRows;
  const bool busy = first < p.tokens;
  const Place* places = shared.places + first;
  T* rows = shared.own[0] + warp * kRows * Tile<T, D>::kStride;
  const auto q = matrix_of(p, qkv, task.window, task.head, D, 0, 3);
  const auto k = matrix_of(p, qkv, task.window, task.head, D, 1, 3);
  const auto v = matrix_of(p, qkv, task.window, task.head, D, 2, 3);
  load_rows<T, D>(rows, q, places, kRows, lane, kWarp, kPlain || p.aligned);
  load_block<T, D, kPlain>(p, shared, k, v, 0);  // queries arrive along with it
  Queries queries =
      describe<T, D, kPlain>(p, task, factor_of(p, scale[task.head]), seed, first, rows);

  const float* bias_rows = bias_of<false>(p, bias, task.head, first, lane);
  float sums[D / 8][4] = {};
#pragma unroll 1
  for (int block = 0; block < p.tokens; block += kBlock) {
    if (block > 0) load_block<T, D, kPlain>(p, shared, k, v, block);
    for (int strip = block; busy && strip < block + kBlock && strip < p.tokens; strip += kStrip) {
      const int offset = (strip - block) * Tile<T, D>::kStride;
      Strip bias_strip, scores;
      Left<T, D> left;  // loaded at each strip: it would occupy registers
      left.load(rows, lane);
      left.multiply(scores, shared.block[0] + offset, lane);
      load_bias<kPlain, false>(p, bias_rows, masked, shared.places, first, strip, lane, bias_strip);
      make_logits<T, D>(shared, queries, bias_strip, strip, lane, scores);
      exponentiate<D>(queries, scores, sums);
      if (!kPlain && p.dropout.on) drop(p, queries, strip, lane, scores);
      accumulate<T, D>(sums, scores, shared.block[1] + offset, lane);
    }
  }
  if (busy) {
    finish<T, D, kPlain>(p, task, queries, sums, places, first, rows,
                         matrix_of(p, out, task.window, task.head, D, 0, 1), lse);
  }
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
    const Problem p = make_problem(shape, options, kMaxWarps<T>, 1, bias, {qkv, out});
    const int64_t grid = static_cast<int64_t>(p.windows) * p.blocks * p.heads;
    return launch_plain_or_not<T>(p, [&](auto plain) {
      return launch(forward_kernel<T, D, decltype(plain)::value>, grid, p.warps * kWarp,
                    Shared<T, D>::bytes(p, 1), stream, p, static_cast<const T*>(qkv), bias, scale,
                    seed, static_cast<T*>(out), lse);
    });
  });
}

}  // namespace swin_moe::cuda
