#include "moe_route.h"

#include <cassert>

#include "moe_route_queues.h"
#include "moe_route_warp.cuh"

namespace swin_moe::cuda {
namespace {

// Rows of E numbers that a warp works with; in the forward kRouteScalars numbers more.
constexpr int kForwardRows = 6, kBackwardRows = 4;

// In the order of the numbers, -0 and 0 alike.
__device__ int32_t order_of(float value) {
  const auto order = static_cast<int32_t>(__float_as_uint(value + 0.0f));
  return order ^ ((order >> 31) & 0x7fffffff);
}

// The k greatest of scores plus bias, the lower index first among equals, with their gates. Returns
// the last.
__device__ int choose(const RouteShape& shape, bool normalize, int lane, bool finite,
                      const float* score, const float* bias, int32_t* order, int64_t* expert,
                      float* gate) {
  constexpr int32_t kTaken = -0x7fffffff - 1;  // below that of any number
  const int E = static_cast<int>(shape.experts), k = static_cast<int>(shape.top_k);
  for (int e = lane; e < E; e += kWarp) {
    order[e] = order_of(score[e] + (bias == nullptr ? 0.0f : bias[e]));
  }
  __syncwarp();  // all scores are read below
  float total = 0.0f;
  int index = 0;
  for (int j = 0; j < k; ++j) {
    int32_t best = kTaken;
    index = lane < E ? lane : E - 1;
    for (int e = lane; e < E; e += kWarp) {
      if (order[e] > best) {
        best = order[e];
        index = e;
      }
    }
    for (int half = kWarp / 2; half > 0; half /= 2) {
      const int32_t other = __shfl_xor_sync(~0u, best, half);
      const int theirs = __shfl_xor_sync(~0u, index, half);
      if (other > best || (other == best && theirs < index)) {
        best = other;
        index = theirs;
      }
    }
    if (index % kWarp == lane) order[index] = kTaken;
    total += score[index];
    if (lane == 0) {
      expert[j] = index;
      gate[j] = finite ? score[index] : 0.0f;
    }
  }
  if (normalize && lane == 0) {
    for (int j = 0; j < k; ++j) gate[j] /= at_least(total, kMinScoreSum);
  }
  return index;
}

// Adds probabilities to this lane's sums.
__device__ void add_probabilities(int experts, int lane, const float* score, float inverse,
                                  float* sums) {
  for (int e = lane; e < experts; e += kWarp) sums[e] += score[e] * inverse;
}

// A warp's shared memory, and its lanes' registers.
struct Work {
  float* sums;    // [3, E], and room for the scalars
  float* noisy;   // [E], as are the next two
  float* score;
  float* apart;
  float scalars[kRouteScalars];  // the extremes are of this lane's logits
};

__device__ Work work_of(int experts, int warp, int lane) {
  const float infinity = __uint_as_float(0x7f800000u);
  const int sums_size = 3 * experts + static_cast<int>(kRouteScalars);
  float* sums = reinterpret_cast<float*>(dynamic_shared_memory()) +
                warp * (sums_size + 3 * experts);
  float* noisy = sums + sums_size;
  for (int n = lane; n < 3 * experts; n += kWarp) sums[n] = 0.0f;
  __syncwarp();
  return {sums, noisy, noisy + experts, noisy + 2 * experts,
          {0.0f, 0.0f, infinity, -infinity, 0.0f}};
}

// Adds a finite token to the sums.
__device__ void add_token(const RouteOptions& options, int experts, int lane, const Token& token,
                          const Scores& scores, int last, Work& work) {
  const auto clean = [&](int e) { return token.clean(e); };
  Scores of_clean = scores;
  const float* clean_score = work.score;
  add_probabilities(experts, lane, work.score, scores.inverse, work.sums);
  if (token.noise != nullptr) {
    of_clean = scores_of(options.sigmoid, experts, lane, clean, work.apart);
    clean_score = work.apart;
  }
  add_probabilities(experts, lane, clean_score, of_clean.inverse, work.sums + experts);
  for (int e = lane; e < experts && options.load_sigma > 0.0f; e += kWarp) {
    const float above = clean_score[e] * of_clean.inverse - work.noisy[last];
    work.sums[2 * experts + e] += 0.5f + 0.5f * erff(above * load_factor(options.load_sigma));
  }
  if (options.sigmoid) of_clean = softmax(experts, lane, clean, work.apart);
  work.scalars[0] += of_clean.lse * of_clean.lse;
  work.scalars[1] += scores.entropy;
  for (int e = lane; e < experts; e += kWarp) {
    work.scalars[2] = Smaller()(work.scalars[2], clean(e));
    work.scalars[3] = Larger()(work.scalars[3], clean(e));
  }
}

// Adds the sums of a block's warps in their order.
__device__ void write_part(int experts, int lane, Work& work, float* part) {
  work.scalars[2] = reduce(work.scalars[2], Smaller());
  work.scalars[3] = reduce(work.scalars[3], Larger());
  for (int n = 0; n < kRouteScalars && lane == 0; ++n) {
    work.sums[3 * experts + n] = work.scalars[n];
  }
  __syncthreads();
  const auto* all = reinterpret_cast<const float*>(dynamic_shared_memory());
  const int size = 3 * experts + static_cast<int>(kRouteScalars), stride = size + 3 * experts;
  const int threads = static_cast<int>(blockDim.x);
  for (int n = static_cast<int>(threadIdx.x); n < size; n += threads) {
    float result = all[n];
    for (int warp = 1; warp < threads / kWarp; ++warp) {
      const float value = all[warp * stride + n];
      result = n == 3 * experts + 2   ? Smaller()(result, value)
               : n == 3 * experts + 3 ? Larger()(result, value)
                                      : result + value;
    }
    part[n] = result;
  }
}

// A block does kTokensPerBlock tokens: choices, gates, keys, and its part of the sums.
__global__ void score_kernel(RouteShape shape, RouteOptions options, RouteInputs in,
                             int64_t* __restrict__ expert, float* __restrict__ gate,
                             uint32_t* __restrict__ keys, float* __restrict__ parts) {
  const int E = static_cast<int>(shape.experts);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  Work work = work_of(E, warp, lane);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock;
  const int64_t limit = first + kTokensPerBlock;
  const int64_t end = limit < shape.tokens ? limit : shape.tokens;
  for (int64_t t = first + warp; t < end; t += warps) {
    const Token token = token_at(shape, in, t, lane);
    __syncwarp();  // the token before is done with
    for (int e = lane; e < E; e += kWarp) work.noisy[e] = token.noisy(e);
    const Scores scores = scores_of(
        options.sigmoid, E, lane, [&](int e) { return work.noisy[e]; }, work.score);
    const int last = choose(shape, options.normalize, lane, token.finite, work.score, in.bias,
                            reinterpret_cast<int32_t*>(work.apart), expert + t * shape.top_k,
                            gate + t * shape.top_k);
    if (lane == 0) {
      const uint32_t bits = __float_as_uint(scores.best) & kRouteLastKey;
      keys[t] = token.finite ? kRouteLastKey - bits : kRouteNoKey;
    }
    if (token.finite) {
      add_token(options, E, lane, token, scores, last, work);
    } else {
      work.scalars[4] += 1.0f;
    }
  }
  write_part(E, lane, work, parts + static_cast<int64_t>(blockIdx.x) * (3 * E + kRouteScalars));
}

// A warp does one of the numbers that every block has a part of.
__global__ void sums_kernel(int experts, int64_t blocks, const float* __restrict__ parts,
                            float* __restrict__ sums, float* __restrict__ scalars) {
  const int size = 3 * experts + static_cast<int>(kRouteScalars);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  if (n >= size) return;
  const float infinity = __uint_as_float(0x7f800000u);
  float sum = 0.0f, low = infinity, high = -infinity;
  for (int64_t block = lane; block < blocks; block += kWarp) {
    const float value = parts[block * size + n];
    sum += value;
    low = Smaller()(low, value);
    high = Larger()(high, value);
  }
  sum = reduce(sum, Add());
  low = reduce(low, Smaller());
  high = reduce(high, Larger());
  const float result = n == 3 * experts + 2 ? low : n == 3 * experts + 3 ? high : sum;
  if (lane == 0) *(n < 3 * experts ? sums + n : scalars + (n - 3 * experts)) = result;
}

// Gradient of the logits from that of the probabilities, or of the scores, in place. Every lane
// reads only its own writes.
__device__ void through_probabilities(int experts, int lane, const Scores& scores,
                                      const float* score, float* grad) {
  float dot = 0.0f;
  for (int e = lane; e < experts; e += kWarp) dot += grad[e] * score[e];
  dot = reduce(dot, Add());
  dot = scores.open ? dot * scores.inverse : 0.0f;
  for (int e = lane; e < experts; e += kWarp) grad[e] = (grad[e] - dot) * scores.inverse;
}

__device__ void through_scores(bool use_sigmoid, int experts, int lane, const float* score,
                               float* grad) {
  float dot = 0.0f;
  for (int e = lane; e < experts; e += kWarp) dot += grad[e] * score[e];
  dot = reduce(dot, Add());
  for (int e = lane; e < experts; e += kWarp) {
    grad[e] = score[e] * (use_sigmoid ? grad[e] * (1.0f - score[e]) : grad[e] - dot);
  }
}

// Adds the gradient of the chosen scores, from that of the gates. One lane does it.
__device__ void add_gate_grad(const RouteShape& shape, bool normalize, const float* score,
                              const int64_t* expert, const float* grad_gate, float* grad) {
  const int k = static_cast<int>(shape.top_k);
  float divisor = 1.0f, shared = 0.0f;
  if (normalize) {
    float total = 0.0f, dot = 0.0f;
    for (int j = 0; j < k; ++j) {
      total += score[expert[j]];
      dot += score[expert[j]] * grad_gate[j];
    }
    divisor = at_least(total, kMinScoreSum);
    if (k > 1 && total >= kMinScoreSum) shared = dot / divisor;
  }
  for (int j = 0; j < k; ++j) grad[expert[j]] += (grad_gate[j] - shared) / divisor;
}

// Writes the gradient of the clean probabilities. Returns that of the k-th noisy logit.
__device__ float sums_grad(int experts, int lane, float sigma, const float* grad_sums,
                           const Scores& clean, const float* score, float threshold, float* grad) {
  const float factor = sigma > 0.0f ? load_factor(sigma) : 0.0f;
  const float height = factor * 0.56418958f;  // of the normal density; 1 / sqrt(pi)
  float total = 0.0f;
  for (int e = lane; e < experts; e += kWarp) {
    const float z = (score[e] * clean.inverse - threshold) * factor;
    const float density = factor > 0.0f ? grad_sums[2 * experts + e] * height * expf(-z * z) : 0.0f;
    grad[e] = grad_sums[experts + e] + density;
    total -= density;
  }
  return reduce(total, Add());
}

__global__ void backward_kernel(RouteShape shape, RouteOptions options, RouteGrads grads,
                                RouteInputs in, const int64_t* __restrict__ expert,
                                float* __restrict__ grad_logits) {
  const int E = static_cast<int>(shape.experts);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (t >= shape.tokens) return;
  float* score = reinterpret_cast<float*>(dynamic_shared_memory()) + warp * kBackwardRows * E;
  float *apart = score + E, *grad = apart + E, *more = grad + E;
  const int64_t* chosen = expert + t * shape.top_k;
  for (int j = lane; j < shape.top_k; j += kWarp) assert(chosen[j] >= 0 && chosen[j] < E);
  const Token token = token_at(shape, in, t, lane);
  float* row = grad_logits + t * E;
  if (!token.finite) {
    for (int e = lane; e < E; e += kWarp) row[e] = 0.0f;
    return;
  }
  const auto clean = [&](int e) { return token.clean(e); };
  const Scores scores =
      scores_of(options.sigmoid, E, lane, [&](int e) { return token.noisy(e); }, score);
  for (int e = lane; e < E; e += kWarp) grad[e] = grads.sums == nullptr ? 0.0f : grads.sums[e];
  through_probabilities(E, lane, scores, score, grad);
  __syncwarp();
  if (grads.gate != nullptr && lane == 0) {
    add_gate_grad(shape, options.normalize, score, chosen, grads.gate + t * shape.top_k, grad);
  }
  __syncwarp();
  through_scores(options.sigmoid, E, lane, score, grad);

  Scores of_clean = scores;
  const float* clean_score = score;
  if (in.noise != nullptr) {
    of_clean = scores_of(options.sigmoid, E, lane, clean, apart);
    clean_score = apart;
  }
  if (grads.sums != nullptr) {
    const int last = static_cast<int>(chosen[shape.top_k - 1]);
    const float grad_threshold = sums_grad(E, lane, options.load_sigma, grads.sums, of_clean,
                                           clean_score, token.noisy(last), more);
    through_probabilities(E, lane, of_clean, clean_score, more);
    through_scores(options.sigmoid, E, lane, clean_score, more);
    for (int e = lane; e < E; e += kWarp) grad[e] += more[e] + (e == last ? grad_threshold : 0.0f);
  }
  if (grads.scalars != nullptr) {
    if (options.sigmoid) {
      of_clean = softmax(E, lane, clean, apart);
      clean_score = apart;
    }
    const float factor = 2.0f * grads.scalars[0] * of_clean.lse;
    for (int e = lane; e < E; e += kWarp) grad[e] += factor * clean_score[e];
  }
  for (int e = lane; e < E; e += kWarp) row[e] = grad[e];
}

int64_t part_size(const RouteShape& shape) { return 3 * shape.experts + kRouteScalars; }

}  // namespace

bool moe_route_supported(const RouteShape& shape) { return shape.experts <= kMaxExperts; }

int64_t moe_route_workspace(const RouteShape& shape) {
  const int64_t words = shape.tokens + token_blocks(shape) * part_size(shape);
  return words * static_cast<int64_t>(sizeof(float)) + route_queues_workspace(shape);
}

cudaError_t moe_route(const RouteShape& shape, const RouteOptions& options, const RouteInputs& in,
                      const RouteOutputs& out, void* workspace, cudaStream_t stream) {
  const int64_t blocks = token_blocks(shape);
  auto* keys = static_cast<uint32_t*>(workspace);
  auto* parts = reinterpret_cast<float*>(keys + shape.tokens);
  cudaError_t error = cudaSuccess;
  if (blocks > 0) {
    const size_t bytes = (kForwardRows * shape.experts + kRouteScalars) * sizeof(float);
    const int warps = warps_for(bytes);
    error = launch(score_kernel, blocks, warps * kWarp, warps * bytes, stream, shape, options, in,
                   out.expert, out.gate, keys, parts);
    if (error != cudaSuccess) return error;
  }
  error = launch(sums_kernel, (part_size(shape) + kMaxWarps - 1) / kMaxWarps, kMaxWarps * kWarp, 0,
                 stream, static_cast<int>(shape.experts), blocks,
                 static_cast<const float*>(parts), out.sums, out.scalars);
  if (error != cudaSuccess) return error;
  return route_queues(shape, options, keys, out, parts + blocks * part_size(shape), stream);
}

cudaError_t moe_route_backward(const RouteShape& shape, const RouteOptions& options,
                               const RouteGrads& grads, const RouteInputs& in,
                               const int64_t* expert, float* grad_logits, cudaStream_t stream) {
  if (shape.tokens == 0) return cudaSuccess;
  const size_t bytes = kBackwardRows * shape.experts * sizeof(float);
  const int warps = warps_for(bytes);
  return launch(backward_kernel, (shape.tokens + warps - 1) / warps, warps * kWarp, warps * bytes,
                stream, shape, options, grads, in, expert, grad_logits);
}

}  // namespace swin_moe::cuda
