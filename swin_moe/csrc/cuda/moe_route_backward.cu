#include <cassert>

#include "moe_route.h"
#include "moe_route_token.cuh"

namespace swin_moe::cuda {
namespace {

constexpr int kBackwardRows = 6;  // of E numbers, that a team works with

// Gradient of the logits from that of the probabilities, or of the scores, in place. Every lane
// reads only its own writes.
template <typename T>
__device__ void through_probabilities(int experts, const Scores& scores, const float* score,
                                      float* grad) {
  float dot = 0.0f;
  for (int e = T::lane(); e < experts; e += T::kLanes) dot += grad[e] * score[e];
  dot = T::reduce(dot, Add());
  dot = scores.open ? dot * scores.inverse : 0.0f;
  for (int e = T::lane(); e < experts; e += T::kLanes) {
    grad[e] = (grad[e] - dot) * scores.inverse;
  }
}

template <typename T>
__device__ void through_scores(bool use_sigmoid, int experts, const float* score, float* grad) {
  float dot = 0.0f;
  for (int e = T::lane(); e < experts; e += T::kLanes) dot += grad[e] * score[e];
  dot = T::reduce(dot, Add());
  for (int e = T::lane(); e < experts; e += T::kLanes) {
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
template <typename T>
__device__ float sums_grad(int experts, float sigma, const float* grad_sums, const Scores& clean,
                           const float* score, float threshold, float* grad) {
  const float factor = sigma > 0.0f ? load_factor(sigma) : 0.0f;
  const float height = factor * 0.56418958f;  // of the normal density; 1 / sqrt(pi)
  float total = 0.0f;
  for (int e = T::lane(); e < experts; e += T::kLanes) {
    const float z = (score[e] * clean.inverse - threshold) * factor;
    const float density = factor > 0.0f ? grad_sums[2 * experts + e] * height * expf(-z * z) : 0.0f;
    grad[e] = grad_sums[experts + e] + density;
    total -= density;
  }
  return T::reduce(total, Add());
}

// A team's shared memory, each [E].
struct Rows {
  float* token;  // [2, E]
  float* score;
  float* apart;
  float* grad;
  float* more;
};

// Writes the gradient of a finite token's logits to `rows.grad`.
template <typename T>
__device__ void token_grad(const RouteShape& shape, const RouteOptions& options,
                           const RouteGrads& grads, const Token& token, int64_t t,
                           const int64_t* chosen, const Rows& rows) {
  const int E = static_cast<int>(shape.experts);
  float *grad = rows.grad, *more = rows.more;
  const Scores scores = scores_of<T>(options.sigmoid, E, token.noisy, rows.score);
  for (int e = T::lane(); e < E; e += T::kLanes) {
    grad[e] = grads.sums == nullptr ? 0.0f : grads.sums[e];
  }
  through_probabilities<T>(E, scores, rows.score, grad);
  T::sync();
  if (grads.gate != nullptr && T::lane() == 0) {
    add_gate_grad(shape, options.normalize, rows.score, chosen, grads.gate + t * shape.top_k, grad);
  }
  T::sync();
  through_scores<T>(options.sigmoid, E, rows.score, grad);

  Scores of_clean = scores;
  const float* clean_score = rows.score;
  if (token.noisy != token.clean) {
    of_clean = scores_of<T>(options.sigmoid, E, token.clean, rows.apart);
    clean_score = rows.apart;
  }
  if (grads.sums != nullptr) {
    const int last = static_cast<int>(chosen[shape.top_k - 1]);
    const float grad_threshold = sums_grad<T>(E, options.load_sigma, grads.sums, of_clean,
                                              clean_score, token.noisy[last], more);
    through_probabilities<T>(E, of_clean, clean_score, more);
    through_scores<T>(options.sigmoid, E, clean_score, more);
    for (int e = T::lane(); e < E; e += T::kLanes) {
      grad[e] += more[e] + (e == last ? grad_threshold : 0.0f);
    }
  }
  if (grads.scalars != nullptr) {
    if (options.sigmoid) {
      of_clean = softmax<T>(E, token.clean, rows.apart);
      clean_score = rows.apart;
    }
    const float factor = 2.0f * grads.scalars[0] * of_clean.lse;
    for (int e = T::lane(); e < E; e += T::kLanes) grad[e] += factor * clean_score[e];
  }
}

template <typename T>
__global__ void backward_kernel(RouteShape shape, RouteOptions options, RouteGrads grads,
                                RouteInputs in, int stride, const int64_t* __restrict__ expert,
                                float* __restrict__ grad_logits) {
  const int E = static_cast<int>(shape.experts);
  float* own = reinterpret_cast<float*>(dynamic_shared_memory()) + T::index() * stride;
  const Rows rows{own, own + 2 * E, own + 3 * E, own + 4 * E, own + 5 * E};
  const int64_t t = static_cast<int64_t>(blockIdx.x) * T::count() + T::index();
  // A warp stays together: it loads and stores its teams' tokens.
  const int ahead = T::kLanes == 1 ? static_cast<int>(threadIdx.x) % kWarp : 0;
  const Token token = load_token<T>(in, E, t - ahead, shape.tokens, own - ahead * stride, stride);
  if (t < shape.tokens && token.finite) {
    const int64_t* chosen = expert + t * shape.top_k;
    for (int j = T::lane(); j < shape.top_k; j += T::kLanes) {
      assert(chosen[j] >= 0 && chosen[j] < E);
    }
    token_grad<T>(shape, options, grads, token, t, chosen, rows);
  } else {
    for (int e = T::lane(); e < E; e += T::kLanes) rows.grad[e] = 0.0f;
  }
  T::template copy<false>(E, t - ahead, shape.tokens, grad_logits, rows.grad - ahead * stride,
                          stride);
}

}  // namespace

cudaError_t moe_route_backward(const RouteShape& shape, const RouteOptions& options,
                               const RouteGrads& grads, const RouteInputs& in,
                               const int64_t* expert, float* grad_logits, cudaStream_t stream) {
  if (shape.tokens == 0) return cudaSuccess;
  const int64_t numbers = kBackwardRows * shape.experts;
  const auto run = [&](auto team, int teams) {
    using T = decltype(team);
    const int stride = team_stride(T::kLanes, numbers);
    return launch(backward_kernel<T>, (shape.tokens + teams - 1) / teams, teams * T::kLanes,
                  static_cast<size_t>(teams) * stride * sizeof(float), stream, shape, options,
                  grads, in, stride, expert, grad_logits);
  };
  if (shape.experts <= kMaxThreadExperts) return run(Team<1>(), kTokensPerBlock);
  return run(Team<kWarp>(), warps_for(static_cast<int>(numbers)));
}

}  // namespace swin_moe::cuda
