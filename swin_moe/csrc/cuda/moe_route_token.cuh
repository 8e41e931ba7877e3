// One token of the routing, shared by forward and backward. Up to 32 experts, a thread does a
// token; with more, a warp does, whose lanes take the experts in turn. Either is a team, and the
// code is the same: lane l owns numbers l, l + kLanes and so on of the team's rows in shared
// memory.
#pragma once

#include "device.cuh"
#include "moe_route.h"

namespace swin_moe::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kTokensPerBlock = 64;         // their sums are added first
constexpr size_t kSharedBytes = 48 * 1024;  // the default of a block
constexpr int kMaxWarps = 8, kMaxExperts = 1024;
constexpr int kMaxThreadExperts = 32;  // that a thread does alone
constexpr float kLeastExp = -104.0f;   // exp is 0 from here on

inline int64_t token_blocks(const RouteShape& shape) {
  return (shape.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
}

// Numbers in the rows of a team. Threads that work alone have an odd distance: no two of a warp
// use the same bank.
inline int team_stride(int lanes, int64_t numbers) {
  return static_cast<int>(lanes == 1 ? numbers | 1 : numbers);
}

// Warps of a block, each with one team of so many numbers.
inline int warps_for(int numbers) {
  const size_t fit = kSharedBytes / (numbers * sizeof(float));
  return fit < kMaxWarps ? static_cast<int>(fit) : kMaxWarps;
}

template <int kTeamLanes>
struct Team {
  static constexpr int kLanes = kTeamLanes;

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ int index() { return static_cast<int>(threadIdx.x) / kLanes; }  // in the block
  static __device__ int count() { return static_cast<int>(blockDim.x) / kLanes; }
  static __device__ void sync() {
    if constexpr (kLanes > 1) __syncwarp();
  }

  // The same in every lane.
  template <typename Combine>
  static __device__ float reduce(float value, Combine combine) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      value = combine(value, __shfl_xor_sync(~0u, value, half));
    }
    return value;
  }

  // Copies the rows of tokens between global memory and the teams of this warp: the team of `first`
  // is at `rows`, and those after `end` have none. For all threads of the warp.
  template <bool kLoad, typename Number>
  static __device__ void copy(int experts, int64_t first, int64_t end, Number* numbers, float* rows,
                              int stride) {
    const int thread = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kLanes > 1) {
      for (int e = thread; first < end && e < experts; e += kWarp) {
        if constexpr (kLoad) rows[e] = numbers[first * experts + e];
        if constexpr (!kLoad) numbers[first * experts + e] = rows[e];
      }
    } else {
      const int together = kWarp / experts, e = thread % experts;  // neighbours load neighbours
      const int64_t left = end - first;
      const int limit = left < kWarp ? static_cast<int>(left) : kWarp;
      __syncwarp();
      for (int n = thread / experts; thread < together * experts && n < limit; n += together) {
        float& here = rows[n * stride + e];
        if constexpr (kLoad) here = numbers[(first + n) * experts + e];
        if constexpr (!kLoad) numbers[(first + n) * experts + e] = here;
      }
      __syncwarp();
    }
  }
};

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};
struct Smaller {
  __device__ float operator()(float a, float b) const { return a < b ? a : b; }
};

__device__ inline float at_least(float x, float least) { return x > least ? x : least; }

// The logits of one token without and with noise, in shared memory. Those of one that is not finite
// are 0.
struct Token {
  const float* clean;
  const float* noisy;
  bool finite;
};

// Loads the tokens of a warp's teams, the first of which is `first`: into row 0 and, if there is
// noise, row 1 of the team. For all threads of the warp.
template <typename T>
__device__ Token load_token(const RouteInputs& in, int E, int64_t first, int64_t end, float* rows,
                            int stride) {
  float* own = rows;
  if constexpr (T::kLanes == 1) own += static_cast<int>(threadIdx.x) % kWarp * stride;
  T::template copy<true>(E, first, end, in.logits, rows, stride);
  if (in.noise != nullptr) {
    T::template copy<true>(E, first, end, in.noise, rows + E, stride);
  }
  float bad = 0.0f;
  for (int e = T::lane(); e < E; e += T::kLanes) {
    if ((__float_as_uint(own[e]) & 0x7f800000u) == 0x7f800000u) bad = 1.0f;
  }
  const bool finite = T::reduce(bad, Larger()) == 0.0f;
  for (int e = T::lane(); e < E; e += T::kLanes) {
    if (!finite) own[e] = 0.0f;
    if (in.noise != nullptr) own[E + e] = finite ? own[e] + own[E + e] : 0.0f;
  }
  T::sync();  // any lane may read the logit of any expert
  return {own, in.noise != nullptr ? own + E : own, finite};
}

// Numbers about a token's scores.
struct Scores {
  float best;
  float inverse;  // factor from scores to probabilities: 1 for a softmax
  bool open;      // the divisor is a sum that has a gradient
  float lse;      // logsumexp of the logits; only of a softmax
  float entropy;  // of the probabilities, in nats
};

// Writes the softmax of the logits to `score`.
template <typename T>
__device__ Scores softmax(int experts, const float* logits, float* score) {
  float top = __uint_as_float(0xff800000u), sum = 0.0f, moment = 0.0f;
  for (int e = T::lane(); e < experts; e += T::kLanes) top = Larger()(top, logits[e]);
  top = T::reduce(top, Larger());
  for (int e = T::lane(); e < experts; e += T::kLanes) {
    const float below = at_least(logits[e] - top, kLeastExp);  // finite
    const float power = expf(below);
    score[e] = power;
    sum += power;
    moment += power * below;
  }
  sum = T::reduce(sum, Add());
  moment = T::reduce(moment, Add());
  const float inverse = 1.0f / sum;
  for (int e = T::lane(); e < experts; e += T::kLanes) score[e] *= inverse;
  const float log_sum = logf(sum);
  return {inverse, 1.0f, false, top + log_sum, log_sum - moment * inverse};
}

template <typename T>
__device__ Scores sigmoid(int experts, const float* logits, float* score) {
  float best = 0.0f, sum = 0.0f, moment = 0.0f;
  for (int e = T::lane(); e < experts; e += T::kLanes) {
    const float value = logits[e];
    const float small = expf(-fabsf(value));
    const float chance = (value < 0.0f ? small : 1.0f) / (1.0f + small);
    score[e] = chance;
    best = Larger()(best, chance);
    sum += chance;
    moment += chance * ((value < 0.0f ? value : 0.0f) - log1pf(small));
  }
  best = T::reduce(best, Larger());
  sum = T::reduce(sum, Add());
  moment = T::reduce(moment, Add());
  const float divisor = at_least(sum, kMinScoreSum);
  return {best, 1.0f / divisor, sum >= kMinScoreSum, 0.0f,
          (sum * logf(divisor) - moment) / divisor};
}

template <typename T>
__device__ Scores scores_of(bool use_sigmoid, int experts, const float* logits, float* score) {
  return use_sigmoid ? sigmoid<T>(experts, logits, score) : softmax<T>(experts, logits, score);
}

// The factor of (probability - threshold) in the load estimate's error function.
__device__ inline float load_factor(float sigma) { return 0.70710678f / sigma; }

}  // namespace
}  // namespace swin_moe::cuda
