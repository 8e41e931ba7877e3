#include "moe_route.h"

#include "moe_route_queues.cuh"
#include "moe_route_token.cuh"

namespace swin_moe::cuda {
namespace {

// Rows of E numbers that a team works with, and kRouteScalars numbers more.
constexpr int kForwardRows = 7;

// In the order of the numbers, -0 and 0 alike.
__device__ int32_t order_of(float value) {
  const auto order = static_cast<int32_t>(__float_as_uint(value + 0.0f));
  return order ^ ((order >> 31) & 0x7fffffff);
}

// The k greatest of scores plus bias, the lower index first among equals, with their gates. Returns
// the last.
template <typename T>
__device__ int choose(const RouteShape& shape, bool normalize, bool finite, const float* score,
                      const float* bias, int32_t* order, int64_t* expert, float* gate) {
  constexpr int32_t kTaken = -0x7fffffff - 1;  // below that of any number
  const int E = static_cast<int>(shape.experts), k = static_cast<int>(shape.top_k);
  for (int e = T::lane(); e < E; e += T::kLanes) {
    order[e] = order_of(score[e] + (bias == nullptr ? 0.0f : bias[e]));
  }
  T::sync();  // all scores are read below
  float total = 0.0f;
  int index = 0;
  for (int j = 0; j < k; ++j) {
    int32_t best = kTaken;
    index = T::lane() < E ? T::lane() : E - 1;
    for (int e = T::lane(); e < E; e += T::kLanes) {
      if (order[e] > best) {
        best = order[e];
        index = e;
      }
    }
    for (int half = T::kLanes / 2; half > 0; half /= 2) {
      const int32_t other = __shfl_xor_sync(~0u, best, half);
      const int theirs = __shfl_xor_sync(~0u, index, half);
      if (other > best || (other == best && theirs < index)) {
        best = other;
        index = theirs;
      }
    }
    if (index % T::kLanes == T::lane()) order[index] = kTaken;
    total += score[index];
    if (T::lane() == 0) {
      expert[j] = index;
      gate[j] = finite ? score[index] : 0.0f;
    }
  }
  if (normalize && T::lane() == 0) {
    for (int j = 0; j < k; ++j) gate[j] /= at_least(total, kMinScoreSum);
  }
  return index;
}

// Writes a token's key, and counts it for the queues or for the first pass of their sort. One
// thread does it.
__device__ void write_key(const Queues& queues, bool prioritized, int t, bool finite, float best,
                          const int64_t* expert, uint32_t* keys) {
  const uint32_t bits = __float_as_uint(best) & kRouteLastKey;
  const uint32_t key = finite ? kRouteLastKey - bits : kRouteNoKey;
  keys[t] = key;
  if (prioritized) {
    if (!queues.alone()) count_digit(queues, 0, t, key);
  } else if (finite) {
    for (int64_t j = 0; j < queues.shape.top_k; ++j) count_choice(queues, t, j, expert[j]);
  }
}

// Adds probabilities to this lane's sums.
template <typename T>
__device__ void add_probabilities(int experts, const float* score, float inverse, float* sums) {
  for (int e = T::lane(); e < experts; e += T::kLanes) sums[e] += score[e] * inverse;
}

// A team's shared memory, and its lanes' registers.
struct Work {
  float* token;  // [2, E]: the logits without and with noise
  float* score;  // [E]
  float* apart;  // [E]
  float* sums;   // [3, E], and room for the scalars
  float scalars[kRouteScalars];  // the extremes are of this lane's logits
};

template <typename T>
__device__ Work work_of(int experts, int stride) {
  const float infinity = __uint_as_float(0x7f800000u);
  float* rows = reinterpret_cast<float*>(dynamic_shared_memory()) + T::index() * stride;
  float* sums = rows + 4 * experts;
  for (int n = T::lane(); n < 3 * experts; n += T::kLanes) sums[n] = 0.0f;
  return {rows, rows + 2 * experts, rows + 3 * experts, sums,
          {0.0f, 0.0f, infinity, -infinity, 0.0f}};
}

// Adds a finite token to the sums.
template <typename T>
__device__ void add_token(const RouteOptions& options, int experts, const Token& token,
                          const Scores& scores, int last, Work& work) {
  Scores of_clean = scores;
  const float* clean_score = work.score;
  add_probabilities<T>(experts, work.score, scores.inverse, work.sums);
  if (token.noisy != token.clean) {
    of_clean = scores_of<T>(options.sigmoid, experts, token.clean, work.apart);
    clean_score = work.apart;
  }
  add_probabilities<T>(experts, clean_score, of_clean.inverse, work.sums + experts);
  if (options.load_sigma > 0.0f) {
    const float factor = load_factor(options.load_sigma), threshold = token.noisy[last];
    for (int e = T::lane(); e < experts; e += T::kLanes) {
      const float above = clean_score[e] * of_clean.inverse - threshold;
      work.sums[2 * experts + e] += 0.5f + 0.5f * erff(above * factor);
    }
  }
  if (options.sigmoid) of_clean = softmax<T>(experts, token.clean, work.apart);
  work.scalars[0] += of_clean.lse * of_clean.lse;
  work.scalars[1] += scores.entropy;
  for (int e = T::lane(); e < experts; e += T::kLanes) {
    work.scalars[2] = Smaller()(work.scalars[2], token.clean[e]);
    work.scalars[3] = Larger()(work.scalars[3], token.clean[e]);
  }
}

// Adds the sums of a block's teams in their order.
template <typename T>
__device__ void write_part(int experts, int stride, Work& work, float* part) {
  work.scalars[2] = T::reduce(work.scalars[2], Smaller());
  work.scalars[3] = T::reduce(work.scalars[3], Larger());
  for (int n = 0; n < kRouteScalars && T::lane() == 0; ++n) {
    work.sums[3 * experts + n] = work.scalars[n];
  }
  __syncthreads();
  const float* all = reinterpret_cast<const float*>(dynamic_shared_memory()) + 4 * experts;
  const int size = 3 * experts + static_cast<int>(kRouteScalars);
  for (int n = static_cast<int>(threadIdx.x); n < size; n += static_cast<int>(blockDim.x)) {
    float result = all[n];
    for (int team = 1; team < T::count(); ++team) {
      const float value = all[team * stride + n];
      result = n == 3 * experts + 2   ? Smaller()(result, value)
               : n == 3 * experts + 3 ? Larger()(result, value)
                                      : result + value;
    }
    part[n] = result;
  }
}

// A block does kTokensPerBlock tokens: choices, gates, keys, and its part of the sums.
template <typename T>
__global__ void score_kernel(Queues queues, RouteOptions options, RouteInputs in, int stride,
                             int64_t* __restrict__ expert, float* __restrict__ gate,
                             uint32_t* __restrict__ keys, float* __restrict__ parts) {
  const RouteShape& shape = queues.shape;
  const int E = static_cast<int>(shape.experts);
  Work work = work_of<T>(E, stride);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock;
  const int64_t limit = begin + kTokensPerBlock;
  const int64_t end = limit < shape.tokens ? limit : shape.tokens;
  // A warp stays together: it loads its teams' tokens.
  const int ahead = T::kLanes == 1 ? static_cast<int>(threadIdx.x) % kWarp : 0;
  for (int64_t t = begin + T::index(); t - ahead < end; t += T::count()) {
    T::sync();  // the token before is done with
    const Token token = load_token<T>(in, E, t - ahead, end, work.token - ahead * stride, stride);
    if (t >= end) break;
    const Scores scores = scores_of<T>(options.sigmoid, E, token.noisy, work.score);
    int64_t* chosen = expert + t * shape.top_k;
    const int last = choose<T>(shape, options.normalize, token.finite, work.score, in.bias,
                               reinterpret_cast<int32_t*>(work.apart), chosen,
                               gate + t * shape.top_k);
    if (T::lane() == 0) {
      write_key(queues, options.prioritized, static_cast<int>(t), token.finite, scores.best,
                chosen, keys);
    }
    if (token.finite) {
      add_token<T>(options, E, token, scores, last, work);
    } else {
      work.scalars[4] += 1.0f;
    }
  }
  float* part = parts + static_cast<int64_t>(blockIdx.x) * (3 * E + kRouteScalars);
  write_part<T>(E, stride, work, part);
}

int64_t part_size(const RouteShape& shape) { return 3 * shape.experts + kRouteScalars; }

// Where a routing's memory lies: the keys, the parts of the sums, and the queues.
struct Memory {
  Memory(const RouteShape& shape, void* workspace)
      : keys(static_cast<uint32_t*>(workspace)),
        parts(reinterpret_cast<float*>(keys + shape.tokens)),
        queues(route_queues(shape, parts + token_blocks(shape) * part_size(shape))) {}

  uint32_t* keys;
  float* parts;
  Queues queues;
};

cudaError_t score(const Memory& memory, const RouteOptions& options, const RouteInputs& in,
                  const RouteOutputs& out, cudaStream_t stream) {
  const RouteShape& shape = memory.queues.shape;
  const int64_t numbers = kForwardRows * shape.experts + kRouteScalars;
  const auto run = [&](auto team, int teams) {
    using T = decltype(team);
    const int stride = team_stride(T::kLanes, numbers);
    return launch(score_kernel<T>, token_blocks(shape), teams * T::kLanes,
                  static_cast<size_t>(teams) * stride * sizeof(float), stream, memory.queues,
                  options, in, stride, out.expert, out.gate, memory.keys, memory.parts);
  };
  if (shape.experts <= kMaxThreadExperts) return run(Team<1>(), kTokensPerBlock);
  return run(Team<kWarp>(), warps_for(static_cast<int>(numbers)));
}

}  // namespace

bool moe_route_supported(const RouteShape& shape) { return shape.experts <= kMaxExperts; }

int64_t moe_route_workspace(const RouteShape& shape) {
  const int64_t words = shape.tokens + token_blocks(shape) * part_size(shape);
  return words * static_cast<int64_t>(sizeof(float)) + route_queues_workspace(shape);
}

cudaError_t moe_route(const RouteShape& shape, const RouteOptions& options, const RouteInputs& in,
                      const RouteOutputs& out, void* workspace, cudaStream_t stream) {
  const Memory memory(shape, workspace);
  const Queues& queues = memory.queues;
  Items items{memory.keys, nullptr};
  cudaError_t error = cudaSuccess;
  if (shape.tokens > 0) {
    error = route_clear(queues, options.prioritized, stream);
    if (error == cudaSuccess) error = score(memory, options, in, out, stream);
    if (error == cudaSuccess && options.prioritized) {
      error = route_sort(queues, memory.keys, out.expert, items, stream);
    }
  }
  if (error == cudaSuccess) {
    error = route_plan(queues, token_blocks(shape), memory.parts, out, stream);
  }
  return error == cudaSuccess ? route_place(queues, items, out, stream) : error;
}

}  // namespace swin_moe::cuda
