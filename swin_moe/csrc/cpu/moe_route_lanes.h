// Shared by the routing's forward and backward: a block of tokens, one per lane, expert by expert.
// So no number is summed or compared across lanes, any number of experts fills the vectors, and the
// result of a token does not depend on its neighbours.
#pragma once

#include "lane_math.h"
#include "moe_route.h"

namespace swin_moe::cpu {
namespace {

constexpr int64_t kLanes = 32;  // tokens in a block; matrices of a block are [E, kLanes]

// Lanes are independent, even if pointers alias.
#define SWIN_MOE_EACH_LANE(i) _Pragma("GCC ivdep") for (int64_t i = 0; i < kLanes; ++i)

// `count` rows of E numbers, zeros in the lanes that are left.
SWIN_MOE_INLINE void load_rows(int64_t experts, int64_t count, const float* rows, float* block) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t e = 0; e < experts; ++e) block[e * kLanes + i] = rows[i * experts + e];
  }
  for (int64_t i = count; i < kLanes; ++i) {
    for (int64_t e = 0; e < experts; ++e) block[e * kLanes + i] = 0.0f;
  }
}

// Logits without and with noise; both are 0 for a token that is not finite, whose weight is 0.
// Without noise `noisy` is `clean`.
SWIN_MOE_INLINE void load_logits(int64_t experts, int64_t token, int64_t count,
                                 const RouteInputs& in, float* clean, float* noisy,
                                 float* weight) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  load_rows(experts, count, in.logits + token * experts, clean);
  uint32_t bad[kLanes] = {};
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      bad[i] |= (bits_of(clean[e * kLanes + i]) & kInfinity) == kInfinity ? 1u : 0u;
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) weight[i] = bad[i] || i >= count ? 0.0f : 1.0f;
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) clean[e * kLanes + i] = bad[i] ? 0.0f : clean[e * kLanes + i];
  }
  if (in.noise == nullptr) return;
  load_rows(experts, count, in.noise + token * experts, noisy);
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      noisy[e * kLanes + i] = clean[e * kLanes + i] + (bad[i] ? 0.0f : noisy[e * kLanes + i]);
    }
  }
}

struct Scores {
  float* score;            // [E, kLanes]
  float inverse[kLanes];   // factor from scores to probabilities: 1 for a softmax
  float open[kLanes];      // 1 if the divisor is a sum that has a gradient, otherwise 0
  float lse[kLanes];       // logsumexp of the logits; only of a softmax
  float entropy[kLanes];   // of the probabilities, in nats
};

SWIN_MOE_INLINE void greatest(int64_t experts, const float* x, float* result) {
  SWIN_MOE_EACH_LANE(i) result[i] = x[i];
  for (int64_t e = 1; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) result[i] = larger(result[i], x[e * kLanes + i]);
  }
}

SWIN_MOE_INLINE void softmax(int64_t experts, const float* x, Scores& out) {
  float top[kLanes], sum[kLanes] = {}, moment[kLanes] = {};
  greatest(experts, x, top);
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      const float below = not_below(x[e * kLanes + i] - top[i], kLeastExp);
      const float term = exp_lane(below);
      out.score[e * kLanes + i] = term;
      sum[i] += term;
      moment[i] += term * below;
    }
  }
  SWIN_MOE_EACH_LANE(i) {
    const float log_sum = log_lane(sum[i]);
    out.lse[i] = top[i] + log_sum;
    sum[i] = 1.0f / sum[i];
    out.entropy[i] = log_sum - moment[i] * sum[i];
    out.inverse[i] = 1.0f;
    out.open[i] = 0.0f;
  }
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) out.score[e * kLanes + i] *= sum[i];
  }
}

SWIN_MOE_INLINE void sigmoid(int64_t experts, const float* x, Scores& out) {
  float sum[kLanes] = {}, moment[kLanes] = {};
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      const float value = x[e * kLanes + i];
      const float small = exp_lane(not_below(minus_abs(value), kLeastExp));
      const float score = by_sign(value, small, 1.0f) / (1.0f + small);
      out.score[e * kLanes + i] = score;
      sum[i] += score;
      moment[i] += score * (by_sign(value, value, 0.0f) - log_lane(1.0f + small));
    }
  }
  SWIN_MOE_EACH_LANE(i) {
    const float divisor = at_least(sum[i], kMinScoreSum);
    out.inverse[i] = 1.0f / divisor;
    out.open[i] = static_cast<float>(sum[i] >= kMinScoreSum);
    out.entropy[i] = (sum[i] * log_lane(divisor) - moment[i]) * out.inverse[i];
    out.lse[i] = 0.0f;
  }
}

SWIN_MOE_INLINE void score_block(bool use_sigmoid, int64_t experts, const float* x, Scores& out) {
  if (use_sigmoid) {
    sigmoid(experts, x, out);
  } else {
    softmax(experts, x, out);
  }
}

// The factor of (probability - threshold) in the load estimate's error function.
SWIN_MOE_INLINE float load_factor(float sigma) { return 0.70710678f / sigma; }

}  // namespace
}  // namespace swin_moe::cpu
