// Backward: a kernel whose warps own queries (dQ, gradients of bias and scale), then one whose
// warps own keys (dK, dV), then sums over the groups of windows. The tiling is explained in
// window_attention_common.cuh.
#include "window_attention.h"
#include "window_attention_partials.cuh"
#include "window_attention_tiles.cuh"

namespace swin_moe::cuda {
namespace {

// Threads of an SM for which the registers must suffice. Up to head_dim 32 plain instances are two
// CTAs of 8 warps, one of which computes while the other one waits for its rows; others have more
// numbers to keep and are three CTAs of 4 warps.
template <typename T, int D, bool kPlain>
constexpr int kRegisterThreads = sizeof(T) == 4 || D > 32 || kPlain ? 256 : 384;
template <int D, bool kPlain>
constexpr int kRegisterCtas = D <= 32 && kPlain ? 2 : 1;

template <typename T>
struct Tensors {
  const T* grad_out;
  const T* qkv;
  const float* bias;
  const float* scale;
  const int64_t* seed;
  const T* out;
  const float* lse;
  T* grad_qkv;
};

// Sums over a query's keys, of which each lane has its columns'. Slopes add up to nothing, but for
// the rounding of `out` in delta. That error would grow with the mean of the products on its way to
// the gradient of the scale, a sum in which most terms cancel: it is subtracted again.
struct Means {
  float slopes[2] = {};
  float products[2] = {};  // weighted by probabilities
};

// A thread's statistics of its two rows of scores, g and g + 8 of its warp's.
struct Rows {
  float scale[2];
  // of queries
  float lse[2];
  float delta[2];
  uint32_t random[2];
};

// Norms and scales of a warp's rows, which are brought to norms in [1, 2) if attention is cosine.
template <typename T, int D>
__device__ __forceinline__ void normalise_rows(const Problem& p, float factor, T* rows, int lane,
                                               Rows& result) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* row = rows + (lane / 4 + r * 8) * Tile<T, D>::kStride;
    Norm norm;
    if (p.cosine) norm = normalise<T, D, true>(row, lane);
    result.scale[r] = factor * norm.weight;
    if (lane % 4 == 0) norm_of<T, D>(row) = norm;
  }
}

// The gradient of a warp's rows of q or k takes their place in shared memory, given its sums of the
// other's rows. `dots` become the inner products of the (normalised) rows and the sums.
template <typename T, int D>
__device__ __forceinline__ void project(const Problem& p, float factor,
                                        const float (&sums)[D / 8][4], T* tile, int lane,
                                        float (&dots)[2]) {
  __syncwarp();  // the rows have been read
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* row = tile + (lane / 4 + r * 8) * Tile<T, D>::kStride;
    T* pairs = row + lane % 4 * 2;
    float dot = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float2 x = load_pair(pairs + n * 8);
      dot += x.x * sums[n][2 * r] + x.y * sums[n][2 * r + 1];
    }
    const Norm norm = norm_of<T, D>(row);
    dots[r] = quad_sum(dot) * norm.weight;
    const float times = factor * norm.inverse;
    const bool direct = !p.cosine || norm.tiny;
    const float along = -times * dots[r] * norm.weight;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float2 x = load_pair(pairs + n * 8);
      float dx = times * sums[n][2 * r], dy = times * sums[n][2 * r + 1];
      if (!direct) {
        dx += along * x.x;
        dy += along * x.y;
      }
      store_pair(dx, dy, pairs + n * 8);
    }
  }
  __syncwarp();
}

// ---- queries own the rows ----------------------------------------------------------------------

// The factors of a warp's queries, which are in shared memory with their gradients. Stores delta
// for the keys.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ Rows describe_queries(const Problem& p, const Tensors<T>& tensors,
                                                 const Partials& partials, const Task& task,
                                                 int first, bool stores, const Place* places,
                                                 T* rows, const T* grads) {
  const int lane = threadIdx.x % kWarp;
  const auto out = matrix_of(p, tensors.out, task.window, task.head, D, 0, 1);
  Rows result;
  normalise_rows<T, D>(p, factor_of(p, tensors.scale[task.head]), rows, lane, result);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8, position = places[row].position;
    const int64_t all = row_of(p, task, first + row);
    const T* other = position < 0 ? nullptr : out.row(position);
    result.delta[r] =
        quad_dot<T, D>(grads + row * Tile<T, D>::kStride, other, kPlain || p.aligned, lane);
    result.lse[r] = position < 0 ? INFINITY : tensors.lse[all];
    result.random[r] = !kPlain && p.dropout.on ? random_row(all, *tensors.seed) : 0;
    if (stores && lane % 4 == 0 && first + row < p.tokens) partials.delta[all] = result.delta[r];
  }
  __syncwarp();
  return result;
}

// Loads a block of keys and values to shared memory, and the factors that normalise the keys.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void load_keys(const Problem& p, const Tensors<T>& tensors,
                                          const Task& task, const Shared<T, D>& shared, int first) {
  const int lane = threadIdx.x % kWarp;
  const auto k = matrix_of(p, tensors.qkv, task.window, task.head, D, 1, 3);
  const auto v = matrix_of(p, tensors.qkv, task.window, task.head, D, 2, 3);
  const Place* places = shared.places + first;
  __syncthreads();  // the last block has been read
  const bool aligned = kPlain || p.aligned;
  load_rows<T, D>(shared.block[0], k, places, kBlock, threadIdx.x, blockDim.x, aligned);
  load_rows<T, D>(shared.block[1], v, places, kBlock, threadIdx.x, blockDim.x, aligned);
  wait_for_copies();
  __syncthreads();
  for (int r = threadIdx.x / 4; r < kBlock; r += blockDim.x / 4) {
    T* row = shared.block[0] + r * Tile<T, D>::kStride;
    const float weight = p.cosine ? normalise<T, D, true>(row, lane).weight : 1.0f;
    if (lane % 4 == 0) shared.weights[r] = weight;
  }
  __syncthreads();
}

// Gradients of logits, in place of those of probabilities.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void query_slopes(const Problem& p, const Shared<T, D>& shared,
                                             const Rows& rows, const Strip& scores,
                                             const Strip& bias, int strip, int lane, Strip& slopes,
                                             Means& means) {
  if (!kPlain && p.dropout.on) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slopes[n][i] *= kept(p.dropout, rows.random[i / 2], column_of(strip, lane, n, i));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float2 weights = weights_of(shared.weights, strip, lane, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2;
      const float product = scores[n][i] * (i % 2 == 0 ? weights.x : weights.y);
      const float logit = fmaf(product, rows.scale[r], bias[n][i]);
      const float probability = exp2_flushed(fmaf(logit, kLog2E, -rows.lse[r]));
      slopes[n][i] = probability * (slopes[n][i] - rows.delta[r]);
      means.slopes[r] += slopes[n][i];
      means.products[r] = fmaf(probability, product, means.products[r]);
    }
  }
}

// Adds to the partial gradient of the bias; no other thread has these numbers.
__device__ __forceinline__ void add_bias(float* partial, const Strip& slopes, bool fresh) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float4* at = reinterpret_cast<float4*>(partial) + n * kWarp;
    float4 sum = make_float4(slopes[n][0], slopes[n][1], slopes[n][2], slopes[n][3]);
    if (!fresh) {
      const float4 before = *at;
      sum = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
    }
    *at = sum;
  }
}

// Where two warps share rows, adds what the second one has to the sums of the first one.
template <typename T, int D>
__device__ __forceinline__ void join(const Problem& p, const Shared<T, D>& shared, int tile,
                                     int part, int lane, float (&sums)[D / 8][4], Means& means) {
  static_assert((D / 2 + 4) * (kMaxWarps<T> / 2) * kWarp * sizeof(float) <=
                    2 * Shared<T, D>::kBlockSize * sizeof(T),
                "the sums of all tiles fit into the two blocks");
  float* others = reinterpret_cast<float*>(shared.block[0]) + tile * kWarp + lane;
  const int step = p.tiles * kWarp;
  __syncthreads();  // the blocks have been read
  if (part == 1) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) others[(n * 4 + i) * step] = sums[n][i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      others[(D / 2 + r) * step] = means.slopes[r];
      others[(D / 2 + 2 + r) * step] = means.products[r];
    }
  }
  __syncthreads();
  if (part == 1) return;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] += others[(n * 4 + i) * step];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    means.slopes[r] += others[(D / 2 + r) * step];
    means.products[r] += others[(D / 2 + 2 + r) * step];
  }
}

// One window: dQ, and its part of the gradients of bias and scale; the latter is returned, a part
// from each quad, the same in its four lanes.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ float query_window(const Problem& p, const Tensors<T>& tensors,
                                              const Partials& partials, const Task& task,
                                              const Shared<T, D>& shared, float* bias_sums,
                                              bool fresh) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // the last window's places have been read
  const bool masked = list_places(p, task.window, shared.places);
  const int part = warp < p.tiles ? 0 : 1;  // of the strips of its rows
  const int first = (task.block * p.tiles + warp - part * p.tiles) * kRows;
  const bool busy = first < p.tokens;
  const Place* places = shared.places + first;
  T* tile = shared.own[0] + warp * kRows * Tile<T, D>::kStride;
  T* grads = shared.own[1] + warp * kRows * Tile<T, D>::kStride;
  const auto q = matrix_of(p, tensors.qkv, task.window, task.head, D, 0, 3);
  const auto grad = matrix_of(p, tensors.grad_out, task.window, task.head, D, 0, 1);
  load_rows<T, D>(tile, q, places, kRows, lane, kWarp, kPlain || p.aligned);
  load_rows<T, D>(grads, grad, places, kRows, lane, kWarp, kPlain || p.aligned);
  load_keys<T, D, kPlain>(p, tensors, task, shared, 0);  // queries arrive along with it
  const Rows rows = describe_queries<T, D, kPlain>(p, tensors, partials, task, first, part == 0,
                                                   places, tile, grads);

  const float* bias_rows = bias_of<false>(p, tensors.bias, task.head, first, lane);
  Means means;
  float sums[D / 8][4] = {};
  for (int block = 0; block < p.tokens; block += kBlock) {
    if (block > 0) load_keys<T, D, kPlain>(p, tensors, task, shared, block);
    for (int strip = block + part * kStrip;
         busy && strip < block + kBlock && strip < p.tokens; strip += p.split * kStrip) {
      const int offset = (strip - block) * Tile<T, D>::kStride;
      Strip bias, scores, slopes;
      load_bias<kPlain, false>(p, bias_rows, masked, shared.places, first, strip, lane, bias);
      Left<T, D> left;  // loaded at each strip: it would occupy registers
      left.load(tile, lane);
      left.multiply(scores, shared.block[0] + offset, lane);
      left.load(grads, lane);
      left.multiply(slopes, shared.block[1] + offset, lane);
      query_slopes<T, D, kPlain>(p, shared, rows, scores, bias, strip, lane, slopes, means);
      add_bias(bias_sums + strip * kRows, slopes, fresh);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 weights = weights_of(shared.weights, strip, lane, n);
#pragma unroll
        for (int i = 0; i < 4; ++i) slopes[n][i] *= i % 2 == 0 ? weights.x : weights.y;
      }
      accumulate<T, D>(sums, slopes, shared.block[0] + offset, lane);
    }
  }
  if (p.split == 2) {
    join<T, D>(p, shared, warp - part * p.tiles, part, lane, sums, means);
    if (part == 1) return 0.0f;
  }
  const float factor = factor_of(p, tensors.scale[task.head]);  // again, to spare its register
  float dots[2];
  project<T, D>(p, factor, sums, tile, lane, dots);
  store_rows<T, D>(tile, matrix_of(p, tensors.grad_qkv, task.window, task.head, D, 0, 3), places,
                   lane, kPlain || p.aligned);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* row = tile + (lane / 4 + r * 8) * Tile<T, D>::kStride;
    const float mean = quad_sum(means.products[r]) * norm_of<T, D>(row).weight;
    dots[r] -= quad_sum(means.slopes[r]) * mean;
  }
  return (dots[0] + dots[1]) * (p.cosine ? factor : 1.0f);
}

// The sum of a CTA's quads, to be called by all threads; thread 0 has it.
__device__ __forceinline__ float sum_quads(const Problem& p, float value, float* sums) {
  const int lane = threadIdx.x % kWarp;
  for (int half = 16; half >= 4; half /= 2) value += __shfl_xor_sync(kAllLanes, value, half);
  __syncthreads();
  if (lane == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; threadIdx.x == 0 && w < p.warps; ++w) sum += sums[w];
  return sum;
}

template <typename T, int D, bool kPlain>
__global__ void __launch_bounds__(kRegisterThreads<T, D, kPlain>, kRegisterCtas<D, kPlain>)
    query_kernel(Problem p, Tensors<T> tensors, Partials partials) {
  Task task = task_of(p, blockIdx.x);
  const int group = task.window, warp = threadIdx.x / kWarp;
  const int tile = task.block * p.tiles + (warp < p.tiles ? warp : warp - p.tiles);
  const Shared<T, D> shared(p, 2);
  float* bias_sums = partials.bias +
                     (static_cast<int64_t>(group) * p.heads + task.head) * partials.bias_size() +
                     static_cast<int64_t>(tile) * partials.strips * kRows * kStrip +
                     threadIdx.x % kWarp * 4;
  const int first = group * partials.group;
  float scale = 0.0f;
  for (task.window = first; task.window < first + partials.group && task.window < p.windows;
       ++task.window) {
    scale += query_window<T, D, kPlain>(p, tensors, partials, task, shared, bias_sums,
                                        task.window == first);
  }
  const float sum = sum_quads(p, scale, reinterpret_cast<float*>(shared.columns));
  if (threadIdx.x == 0) {
    const int64_t row = static_cast<int64_t>(task.head) * partials.groups + group;
    partials.scale[row * p.blocks + task.block] = sum;
  }
}

// ---- keys own the rows -------------------------------------------------------------------------

// Brings a block of queries and their gradients to shared memory, and all that belongs to them.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void load_queries(const Problem& p, const Tensors<T>& tensors,
                                             const Partials& partials, const Task& task,
                                             const Shared<T, D>& shared, int first) {
  const int lane = threadIdx.x % kWarp;
  const auto q = matrix_of(p, tensors.qkv, task.window, task.head, D, 0, 3);
  const auto grad = matrix_of(p, tensors.grad_out, task.window, task.head, D, 0, 1);
  const Place* places = shared.places + first;
  __syncthreads();  // the last block has been read
  const bool aligned = kPlain || p.aligned;
  load_rows<T, D>(shared.block[0], q, places, kBlock, threadIdx.x, blockDim.x, aligned);
  load_rows<T, D>(shared.block[1], grad, places, kBlock, threadIdx.x, blockDim.x, aligned);
  wait_for_copies();
  __syncthreads();
  for (int r = threadIdx.x / 4; r < kBlock; r += blockDim.x / 4) {
    T* row = shared.block[0] + r * Tile<T, D>::kStride;
    Column column = {1.0f, INFINITY, 0.0f, 0};
    if (p.cosine) column.weight = normalise<T, D, true>(row, lane).weight;
    if (places[r].position >= 0) {
      const int64_t all = row_of(p, task, first + r);
      column.lse = tensors.lse[all];
      column.delta = partials.delta[all];
      if (!kPlain && p.dropout.on) column.random = random_row(all, *tensors.seed);
    }
    if (lane % 4 == 0) shared.columns[r] = column;
  }
  __syncthreads();
}

// Replaces scores by the probabilities that weigh the values, and gradients of probabilities by
// those of logits, times the factors that normalise the queries.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void key_slopes(const Problem& p, const Shared<T, D>& shared,
                                           const Rows& rows, const Strip& bias, int first,
                                           int strip, int lane, Strip& scores,
                                           Strip& slopes) {
  const Column* columns = shared.columns + strip % unsigned{kBlock} + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Column column = columns[n * 8 + i % 2];
      const int key = first + lane / 4 + i / 2 * 8;
      const float logit = fmaf(scores[n][i] * rows.scale[i / 2], column.weight, bias[n][i]);
      const float exponent = fmaf(logit, kLog2E, -column.lse);
      const float probability = kPlain || key < p.tokens ? exp2_flushed(exponent) : 0.0f;
      float times = 1.0f;
      if (!kPlain && p.dropout.on) times = kept(p.dropout, column.random, key);
      scores[n][i] = probability * times;
      slopes[n][i] = probability * (slopes[n][i] * times - column.delta) * column.weight;
    }
  }
}

template <typename T, int D, bool kPlain>
__global__ void __launch_bounds__(kRegisterThreads<T, D, kPlain>, kRegisterCtas<D, kPlain>)
    key_kernel(Problem p, Tensors<T> tensors, Partials partials) {
  const Task task = task_of(p, blockIdx.x);
  const Shared<T, D> shared(p, 2);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool masked = list_places(p, task.window, shared.places);
  const int first = (task.block * p.tiles + warp) * kRows;
  const Place* places = shared.places + first;
  T* keys = shared.own[0] + warp * kRows * Tile<T, D>::kStride;
  T* values = shared.own[1] + warp * kRows * Tile<T, D>::kStride;
  const auto k = matrix_of(p, tensors.qkv, task.window, task.head, D, 1, 3);
  const auto v = matrix_of(p, tensors.qkv, task.window, task.head, D, 2, 3);
  load_rows<T, D>(keys, k, places, kRows, lane, kWarp, kPlain || p.aligned);
  load_rows<T, D>(values, v, places, kRows, lane, kWarp, kPlain || p.aligned);
  load_queries<T, D, kPlain>(p, tensors, partials, task, shared, 0);  // keys arrive along with it
  Rows rows;
  normalise_rows<T, D>(p, factor_of(p, tensors.scale[task.head]), keys, lane, rows);
  __syncwarp();

  float key_sums[D / 8][4] = {}, value_sums[D / 8][4] = {};
  for (int block = 0; block < p.tokens; block += kBlock) {
    if (block > 0) load_queries<T, D, kPlain>(p, tensors, partials, task, shared, block);
    for (int strip = block; first < p.tokens && strip < block + kBlock && strip < p.tokens;
         strip += kStrip) {
      const int offset = (strip - block) * Tile<T, D>::kStride;
      Strip bias, scores, slopes;
      Left<T, D> left;  // loaded at each strip: it would occupy registers
      left.load(values, lane);
      left.multiply(slopes, shared.block[1] + offset, lane);
      load_bias<kPlain, true>(p, bias_of<true>(p, tensors.bias, task.head, first, lane), masked,
                              shared.places, first, strip, lane, bias);
      left.load(keys, lane);
      left.multiply(scores, shared.block[0] + offset, lane);
      key_slopes<T, D, kPlain>(p, shared, rows, bias, first, strip, lane, scores, slopes);
      accumulate<T, D>(value_sums, scores, shared.block[1] + offset, lane);
      accumulate<T, D>(key_sums, slopes, shared.block[0] + offset, lane);
    }
  }
  const float factor = factor_of(p, tensors.scale[task.head]);  // again, to spare its register
  float dots[2];
  project<T, D>(p, factor, key_sums, keys, lane, dots);
  put_rows<T, D>(value_sums, {1.0f, 1.0f}, values, lane);
  __syncwarp();
  const auto grad_k = matrix_of(p, tensors.grad_qkv, task.window, task.head, D, 1, 3);
  const auto grad_v = matrix_of(p, tensors.grad_qkv, task.window, task.head, D, 2, 3);
  store_rows<T, D>(keys, grad_k, places, lane, kPlain || p.aligned);
  store_rows<T, D>(values, grad_v, places, lane, kPlain || p.aligned);
}

// Launches the kernels of one type and head_dim.
template <typename T, int D>
cudaError_t run_backward(const WindowShape& shape, const WindowOptions& options,
                         const Tensors<T>& tensors, const Partials& partials,
                         float* grad_bias, float* grad_scale, cudaStream_t stream) {
  const auto problem = [&](int split) {
    return make_problem(shape, options, kMaxWarps<T> / split, split, tensors.bias,
                        {tensors.grad_out, tensors.qkv, tensors.out, tensors.grad_qkv});
  };
  const Problem p = problem(query_split(shape)), keys = problem(1);
  const int64_t queries = static_cast<int64_t>(partials.groups) * p.blocks * p.heads;
  const int64_t key_ctas = static_cast<int64_t>(p.windows) * keys.blocks * p.heads;
  const cudaError_t error = launch_plain_or_not<T>(p, [&](auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    const cudaError_t failed =
        launch(query_kernel<T, D, kPlain>, queries, p.warps * kWarp, Shared<T, D>::bytes(p, 2),
               stream, p, tensors, partials);
    if (failed != cudaSuccess) return failed;
    return launch(key_kernel<T, D, kPlain>, key_ctas, keys.warps * kWarp,
                  Shared<T, D>::bytes(keys, 2), stream, keys, tensors, partials);
  });
  if (error != cudaSuccess) return error;
  return reduce(p, partials, tensors.scale, grad_bias, grad_scale, stream);
}

}  // namespace

int64_t window_attention_workspace(const WindowShape& shape) {
  int64_t bytes = 0;
  make_partials(shape, nullptr, &bytes);
  return bytes;
}

cudaError_t window_attention_backward(DType dtype, const WindowShape& shape,
                                      const WindowOptions& options, const void* grad_out,
                                      const void* qkv, const float* bias, const float* scale,
                                      const int64_t* seed, const void* out, const float* lse,
                                      void* grad_qkv, float* grad_bias, float* grad_scale,
                                      void* workspace, cudaStream_t stream) {
  if (!window_attention_supported(shape)) return cudaErrorInvalidValue;
  if (shape.heads == 0) return cudaSuccess;
  if (shape.windows() == 0) {
    const size_t numbers = shape.heads * shape.tokens() * shape.tokens();
    const cudaError_t error = cudaMemsetAsync(grad_bias, 0, numbers * sizeof(float), stream);
    if (error != cudaSuccess) return error;
    return cudaMemsetAsync(grad_scale, 0, shape.heads * sizeof(float), stream);
  }
  int64_t bytes = 0;
  const Partials partials = make_partials(shape, workspace, &bytes);
  return launch_for(dtype, shape.head_dim, [&](auto number, auto head_dim) {
    using T = decltype(number);
    constexpr int D = decltype(head_dim)::value;
    const Tensors<T> tensors = {static_cast<const T*>(grad_out), static_cast<const T*>(qkv), bias,
                                scale, seed, static_cast<const T*>(out), lse,
                                static_cast<T*>(grad_qkv)};
    return run_backward<T, D>(shape, options, tensors, partials, grad_bias, grad_scale, stream);
  });
}

}  // namespace swin_moe::cuda
