// Shared by the routing's forward and backward: one warp per token, whose lanes take the experts in
// turn. Lane l owns numbers l, l + 32 and so on of a row in shared memory.
#pragma once

#include "device.cuh"
#include "moe_route.h"

namespace swin_moe::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kTokensPerBlock = 64;      // their sums are added first
constexpr size_t kSharedBytes = 48 * 1024;  // the default of a block
constexpr int kMaxWarps = 8, kMaxExperts = 1024;
constexpr float kLeastExp = -104.0f;  // exp is 0 from here on

// Warps of a block, each with so much shared memory.
inline int warps_for(size_t bytes) {
  const size_t fit = kSharedBytes / bytes;
  return fit < kMaxWarps ? static_cast<int>(fit) : kMaxWarps;
}

inline int64_t token_blocks(const RouteShape& shape) {
  return (shape.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};
struct Smaller {
  __device__ float operator()(float a, float b) const { return a < b ? a : b; }
};

// The same in every lane.
template <typename Combine>
__device__ float reduce(float value, Combine combine) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    value = combine(value, __shfl_xor_sync(~0u, value, half));
  }
  return value;
}

__device__ inline float at_least(float x, float least) { return x > least ? x : least; }

// The logits of one token; those of one that is not finite are 0, as is its noise.
struct Token {
  const float* logits;
  const float* noise;
  bool finite;

  __device__ float clean(int e) const { return finite ? logits[e] : 0.0f; }
  __device__ float noisy(int e) const {
    return clean(e) + (finite && noise != nullptr ? noise[e] : 0.0f);
  }
};

__device__ inline Token token_at(const RouteShape& shape, const RouteInputs& in, int64_t t,
                                 int lane) {
  const int E = static_cast<int>(shape.experts);
  Token token{in.logits + t * E, in.noise == nullptr ? nullptr : in.noise + t * E, true};
  float bad = 0.0f;
  for (int e = lane; e < E; e += kWarp) {
    if ((__float_as_uint(token.logits[e]) & 0x7f800000u) == 0x7f800000u) bad = 1.0f;
  }
  token.finite = reduce(bad, Larger()) == 0.0f;
  return token;
}

// Numbers about a token's scores.
struct Scores {
  float best;
  float inverse;  // factor from scores to probabilities: 1 for a softmax
  bool open;      // the divisor is a sum that has a gradient
  float lse;      // logsumexp of the logits; only of a softmax
  float entropy;  // of the probabilities, in nats
};

// Writes the softmax of values(e) to `score`.
template <typename Values>
__device__ Scores softmax(int experts, int lane, const Values& values, float* score) {
  float top = __uint_as_float(0xff800000u), sum = 0.0f, moment = 0.0f;
  for (int e = lane; e < experts; e += kWarp) top = Larger()(top, values(e));
  top = reduce(top, Larger());
  for (int e = lane; e < experts; e += kWarp) {
    const float below = at_least(values(e) - top, kLeastExp);  // finite
    score[e] = expf(below);
    sum += score[e];
    moment += score[e] * below;
  }
  sum = reduce(sum, Add());
  moment = reduce(moment, Add());
  for (int e = lane; e < experts; e += kWarp) score[e] /= sum;
  const float log_sum = logf(sum);
  return {1.0f / sum, 1.0f, false, top + log_sum, log_sum - moment / sum};
}

template <typename Values>
__device__ Scores sigmoid(int experts, int lane, const Values& values, float* score) {
  float best = 0.0f, sum = 0.0f, moment = 0.0f;
  for (int e = lane; e < experts; e += kWarp) {
    const float value = values(e);
    const float small = expf(-fabsf(value));
    score[e] = (value < 0.0f ? small : 1.0f) / (1.0f + small);
    best = Larger()(best, score[e]);
    sum += score[e];
    moment += score[e] * ((value < 0.0f ? value : 0.0f) - log1pf(small));
  }
  best = reduce(best, Larger());
  sum = reduce(sum, Add());
  moment = reduce(moment, Add());
  const float divisor = at_least(sum, kMinScoreSum);
  return {best, 1.0f / divisor, sum >= kMinScoreSum, 0.0f,
          (sum * logf(divisor) - moment) / divisor};
}

template <typename Values>
__device__ Scores scores_of(bool use_sigmoid, int experts, int lane, const Values& values,
                            float* score) {
  return use_sigmoid ? sigmoid(experts, lane, values, score)
                     : softmax(experts, lane, values, score);
}

// The factor of (probability - threshold) in the load estimate's error function.
__device__ inline float load_factor(float sigma) { return 0.70710678f / sigma; }

}  // namespace
}  // namespace swin_moe::cuda
