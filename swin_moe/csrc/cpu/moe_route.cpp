#include "moe_route.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "moe_route_lanes.h"

// As in moe_dispatch.cpp.
#if defined(__x86_64__) && defined(__GLIBC__)
#define SWIN_MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SWIN_MOE_CLONES
#endif

namespace swin_moe::cpu {
namespace {

// Sums over the tokens of a chunk, lane by lane: [3 E, kLanes], and `scalars`.
struct Sums {
  float* matrix;
  float scalars[kRouteScalars][kLanes];
};

// In the order of the numbers.
SWIN_MOE_INLINE int32_t order_of(float value) {
  const int32_t order = static_cast<int32_t>(bits_of(value + 0.0f));  // -0 becomes 0
  return order ^ ((order >> 31) & std::numeric_limits<int32_t>::max());
}

// The k greatest of scores plus bias, the lower index first among equals. `last` is the k-th.
SWIN_MOE_INLINE void choose(const RouteShape& shape, int64_t count, const float* score,
                            const float* bias, int32_t* order, int64_t* expert, int32_t* last) {
  constexpr int32_t kTaken = std::numeric_limits<int32_t>::min();  // below that of any number
  for (int64_t e = 0; e < shape.experts; ++e) {
    const float more = bias == nullptr ? 0.0f : bias[e];
    SWIN_MOE_EACH_LANE(i) order[e * kLanes + i] = order_of(score[e * kLanes + i] + more);
  }
  for (int64_t j = 0; j < shape.top_k; ++j) {
    int32_t best[kLanes];
    SWIN_MOE_EACH_LANE(i) {
      best[i] = kTaken;
      last[i] = 0;
    }
    for (int64_t e = 0; e < shape.experts; ++e) {
      SWIN_MOE_EACH_LANE(i) {
        const bool better = order[e * kLanes + i] > best[i];
        last[i] = better ? static_cast<int32_t>(e) : last[i];
        best[i] = better ? order[e * kLanes + i] : best[i];
      }
    }
    for (int64_t i = 0; i < kLanes; ++i) order[last[i] * kLanes + i] = kTaken;
    for (int64_t i = 0; i < count; ++i) expert[i * shape.top_k + j] = last[i];
  }
}

void write_gates(const RouteShape& shape, const RouteOptions& options, int64_t count,
                 const float* score, const float* weight, const int64_t* expert, float* gate) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = gate + i * shape.top_k;
    float total = 0.0f;
    for (int64_t j = 0; j < shape.top_k; ++j) {
      row[j] = score[expert[i * shape.top_k + j] * kLanes + i] * weight[i];
      total += row[j];
    }
    if (!options.normalize) continue;
    total = larger(total, kMinScoreSum);
    for (int64_t j = 0; j < shape.top_k; ++j) row[j] /= total;
  }
}

SWIN_MOE_INLINE void add_scalars(int64_t experts, int64_t count, const float* clean,
                                 const float* weight, const float* lse, const float* entropy,
                                 Sums& sums) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  SWIN_MOE_EACH_LANE(i) {
    sums.scalars[0][i] += weight[i] * lse[i] * lse[i];
    sums.scalars[1][i] += weight[i] * entropy[i];
  }
  float away[kLanes];  // excludes other lanes from the extremes
  for (int64_t i = 0; i < kLanes; ++i) away[i] = weight[i] > 0.0f ? 0.0f : kInfinity;
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      sums.scalars[2][i] = smaller(sums.scalars[2][i], clean[e * kLanes + i] + away[i]);
      sums.scalars[3][i] = larger(sums.scalars[3][i], clean[e * kLanes + i] - away[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) sums.scalars[4][i] += 1.0f - weight[i];
}

SWIN_MOE_INLINE void add_probabilities(int64_t experts, const Scores& scores, const float* weight,
                                       float* sums) {
  float factor[kLanes];
  SWIN_MOE_EACH_LANE(i) factor[i] = scores.inverse[i] * weight[i];
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      sums[e * kLanes + i] += scores.score[e * kLanes + i] * factor[i];
    }
  }
}

// The chance that a probability beats the k-th noisy logit under the noise.
SWIN_MOE_INLINE void add_load(int64_t experts, float sigma, const Scores& clean,
                              const float* threshold, const float* weight, float* sums) {
  const float factor = load_factor(sigma);
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      const float probability = clean.score[e * kLanes + i] * clean.inverse[i];
      const float load = 0.5f + 0.5f * erf_lane((probability - threshold[i]) * factor);
      sums[e * kLanes + i] += weight[i] * load;
    }
  }
}

// One number per row of lanes.
SWIN_MOE_INLINE float add_lanes(float* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

SWIN_MOE_INLINE void clear(int64_t experts, Sums& sums) {
  std::fill_n(sums.matrix, 3 * experts * kLanes, 0.0f);
  std::fill_n(sums.scalars[0], kRouteScalars * kLanes, 0.0f);
  std::fill_n(sums.scalars[2], kLanes, std::numeric_limits<float>::infinity());
  std::fill_n(sums.scalars[3], kLanes, -std::numeric_limits<float>::infinity());
}

SWIN_MOE_INLINE void write_part(int64_t experts, Sums& sums, float* part) {
  for (int64_t row = 0; row < 3 * experts; ++row) part[row] = add_lanes(sums.matrix + row * kLanes);
  float* scalars = part + 3 * experts;
  for (int64_t row : {0, 1, 4}) scalars[row] = add_lanes(sums.scalars[row]);
  scalars[2] = *std::min_element(sums.scalars[2], sums.scalars[2] + kLanes);
  scalars[3] = *std::max_element(sums.scalars[3], sums.scalars[3] + kLanes);
}

// The matrices of a block, [E, kLanes] each; unneeded ones share memory.
struct Blocks {
  Blocks(int64_t experts, int64_t number)
      : size(experts * kLanes), memory(new float[number * size]) {}
  float* operator[](int64_t index) const { return memory.get() + index * size; }

  int64_t size;
  std::unique_ptr<float[]> memory;
};

SWIN_MOE_INLINE void score_tokens(const RouteShape& shape, const RouteOptions& options,
                                  const RouteInputs& in, int64_t token, int64_t count,
                                  const Blocks& blocks, Sums& sums, int64_t* expert, float* gate,
                                  uint32_t* keys) {
  const int64_t E = shape.experts;
  float *clean = blocks[0], *noisy = in.noise == nullptr ? clean : blocks[1];
  float weight[kLanes], top[kLanes], threshold[kLanes];
  int32_t last[kLanes];
  load_logits(E, token, count, in, clean, noisy, weight);

  Scores scores, apart;
  scores.score = blocks[2];
  apart.score = blocks[3];
  score_block(options.sigmoid, E, noisy, scores);
  int64_t* chosen = expert + token * shape.top_k;
  choose(shape, count, scores.score, in.bias, reinterpret_cast<int32_t*>(blocks[4]), chosen, last);
  write_gates(shape, options, count, scores.score, weight, chosen, gate + token * shape.top_k);
  greatest(E, scores.score, top);
  for (int64_t i = 0; i < count; ++i) {
    keys[token + i] =
        weight[i] > 0.0f ? kRouteLastKey - (bits_of(top[i]) & kRouteLastKey) : kRouteNoKey;
  }

  float* matrix = sums.matrix;
  add_probabilities(E, scores, weight, matrix);
  const float* lse = scores.lse;
  if (in.noise != nullptr) {
    score_block(options.sigmoid, E, clean, apart);
    add_probabilities(E, apart, weight, matrix + blocks.size);
    lse = apart.lse;
  }
  if (options.load_sigma > 0.0f) {
    for (int64_t i = 0; i < kLanes; ++i) threshold[i] = noisy[last[i] * kLanes + i];
    add_load(E, options.load_sigma, in.noise == nullptr ? scores : apart, threshold, weight,
             matrix + 2 * blocks.size);
  }
  if (options.sigmoid) {
    apart.score = blocks[4];
    softmax(E, clean, apart);
    lse = apart.lse;
  }
  add_scalars(E, count, clean, weight, lse, scores.entropy, sums);
}

// Gradient of scores from that of probabilities, in place: those of sigmoids are divided by a sum.
SWIN_MOE_INLINE void through_probabilities(int64_t experts, const Scores& scores, float* grad) {
  float dot[kLanes] = {};
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) dot[i] += grad[e * kLanes + i] * scores.score[e * kLanes + i];
  }
  SWIN_MOE_EACH_LANE(i) dot[i] *= scores.inverse[i] * scores.open[i];
  for (int64_t e = 0; e < experts; ++e) {
    SWIN_MOE_EACH_LANE(i) {
      grad[e * kLanes + i] = (grad[e * kLanes + i] - dot[i]) * scores.inverse[i];
    }
  }
}

// Gradient of logits from that of scores, in place.
SWIN_MOE_INLINE void through_scores(bool use_sigmoid, int64_t experts, const Scores& scores,
                                    float* grad) {
  float dot[kLanes] = {};
  for (int64_t e = 0; e < experts && !use_sigmoid; ++e) {
    SWIN_MOE_EACH_LANE(i) dot[i] += grad[e * kLanes + i] * scores.score[e * kLanes + i];
  }
  for (int64_t e = 0; e < experts; ++e) {
    if (use_sigmoid) {
      SWIN_MOE_EACH_LANE(i) grad[e * kLanes + i] *= 1.0f - scores.score[e * kLanes + i];
    } else {
      SWIN_MOE_EACH_LANE(i) grad[e * kLanes + i] -= dot[i];
    }
    SWIN_MOE_EACH_LANE(i) grad[e * kLanes + i] *= scores.score[e * kLanes + i];
  }
}

// Adds the gradient of the chosen scores, from that of the gates.
void add_gate_grad(const RouteShape& shape, const RouteOptions& options, int64_t count,
                   const float* score, const int64_t* expert, const float* grad_gate,
                   float* grad) {
  const int64_t k = shape.top_k;
  for (int64_t i = 0; i < count; ++i, expert += k, grad_gate += k) {
    float divisor = 1.0f, shared = 0.0f;
    if (options.normalize) {
      float total = 0.0f, dot = 0.0f;
      for (int64_t j = 0; j < k; ++j) {
        const float value = score[expert[j] * kLanes + i];
        total += value;
        dot += value * grad_gate[j];
      }
      divisor = larger(total, kMinScoreSum);
      if (k > 1 && total >= kMinScoreSum) shared = dot / divisor;
    }
    for (int64_t j = 0; j < k; ++j) {
      grad[expert[j] * kLanes + i] += (grad_gate[j] - shared) / divisor;
    }
  }
}

// Writes the gradient of the clean probabilities; `threshold` in: the k-th noisy logits, out: the
// gradient of them.
SWIN_MOE_INLINE void sums_grad(int64_t experts, float sigma, const float* grad_sums,
                               const Scores& clean, float* threshold, float* grad) {
  const float factor = sigma > 0.0f ? load_factor(sigma) : 0.0f;
  const float height = factor * 0.56418958f;  // of the normal density; 1 / sqrt(pi)
  float total[kLanes] = {};
  for (int64_t e = 0; e < experts; ++e) {
    const float importance = grad_sums[experts + e], load = grad_sums[2 * experts + e] * height;
    if (factor == 0.0f) {
      SWIN_MOE_EACH_LANE(i) grad[e * kLanes + i] = importance;
      continue;
    }
    SWIN_MOE_EACH_LANE(i) {
      const float probability = clean.score[e * kLanes + i] * clean.inverse[i];
      const float z = (probability - threshold[i]) * factor;
      const float density = load * exp_lane(not_below(-z * z, kLeastExp));
      grad[e * kLanes + i] = importance + density;
      total[i] -= density;
    }
  }
  SWIN_MOE_EACH_LANE(i) threshold[i] = total[i];
}

SWIN_MOE_INLINE void backward_tokens(const RouteShape& shape, const RouteOptions& options,
                                     const RouteGrads& grads, const RouteInputs& in, int64_t token,
                                     int64_t count, const Blocks& blocks, const int64_t* expert,
                                     float* grad_logits) {
  const int64_t E = shape.experts;
  float *clean = blocks[0], *noisy = in.noise == nullptr ? clean : blocks[1];
  float *grad = blocks[4], *more = blocks[5];
  float weight[kLanes], threshold[kLanes] = {};
  const int64_t* chosen = expert + token * shape.top_k;
  load_logits(E, token, count, in, clean, noisy, weight);
  Scores scores, apart;
  scores.score = blocks[2];
  apart.score = blocks[3];
  score_block(options.sigmoid, E, noisy, scores);

  for (int64_t e = 0; e < E; ++e) {
    std::fill_n(grad + e * kLanes, kLanes, grads.sums == nullptr ? 0.0f : grads.sums[e]);
  }
  through_probabilities(E, scores, grad);
  if (grads.gate != nullptr) {
    add_gate_grad(shape, options, count, scores.score, chosen, grads.gate + token * shape.top_k,
                  grad);
  }
  through_scores(options.sigmoid, E, scores, grad);

  if (in.noise != nullptr) score_block(options.sigmoid, E, clean, apart);
  const Scores& of_clean = in.noise == nullptr ? scores : apart;
  if (grads.sums != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      threshold[i] = noisy[chosen[(i + 1) * shape.top_k - 1] * kLanes + i];
    }
    sums_grad(E, options.load_sigma, grads.sums, of_clean, threshold, more);
    through_probabilities(E, of_clean, more);
    through_scores(options.sigmoid, E, of_clean, more);
    for (int64_t n = 0; n < blocks.size; ++n) grad[n] += more[n];
    for (int64_t i = 0; i < count && options.load_sigma > 0.0f; ++i) {
      grad[chosen[(i + 1) * shape.top_k - 1] * kLanes + i] += threshold[i];
    }
  }
  if (grads.scalars != nullptr) {
    Scores whole = of_clean;
    if (options.sigmoid) {
      whole.score = more;
      softmax(E, clean, whole);
    }
    for (int64_t e = 0; e < E; ++e) {
      SWIN_MOE_EACH_LANE(i) {
        grad[e * kLanes + i] +=
            2.0f * grads.scalars[0] * whole.lse[i] * whole.score[e * kLanes + i];
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    float* row = grad_logits + (token + i) * E;
    for (int64_t e = 0; e < E; ++e) row[e] = weight[i] > 0.0f ? grad[e * kLanes + i] : 0.0f;
  }
}

}  // namespace

SWIN_MOE_CLONES void route_scores(const RouteShape& shape, const RouteOptions& options,
                                  Range chunks, const RouteInputs& in, int64_t* expert,
                                  float* gate, uint32_t* keys, float* parts) {
  const Blocks blocks(shape.experts, 8);
  Sums sums;
  sums.matrix = blocks[5];
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    clear(shape.experts, sums);
    const int64_t end = std::min((chunk + 1) * kRouteChunk, shape.tokens);
    for (int64_t token = chunk * kRouteChunk; token < end; token += kLanes) {
      score_tokens(shape, options, in, token, std::min(kLanes, end - token), blocks, sums, expert,
                   gate, keys);
    }
    if (in.noise == nullptr) std::copy_n(sums.matrix, blocks.size, sums.matrix + blocks.size);
    write_part(shape.experts, sums, parts + chunk * route_part_size(shape));
  }
}

SWIN_MOE_CLONES void route_backward(const RouteShape& shape, const RouteOptions& options,
                                    Range chunks, const RouteGrads& grads, const RouteInputs& in,
                                    const int64_t* expert, float* grad_logits) {
  const Blocks blocks(shape.experts, 6);
  const int64_t end = std::min(chunks.end * kRouteChunk, shape.tokens);
  for (int64_t token = chunks.begin * kRouteChunk; token < end; token += kLanes) {
    backward_tokens(shape, options, grads, in, token, std::min(kLanes, end - token), blocks,
                    expert, grad_logits);
  }
}

void route_sums(const RouteShape& shape, const float* parts, float* sums, float* scalars) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t chunks = route_chunks(shape), size = route_part_size(shape);
  const int64_t least = 3 * shape.experts + 2, most = least + 1;
  for (int64_t at = 0; at < size; ++at) {
    float low = kInfinity, high = -kInfinity;
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float value = parts[chunk * size + at];
      sum += value;
      low = std::min(low, value);
      high = std::max(high, value);
    }
    float* to = at < 3 * shape.experts ? sums + at : scalars + (at - 3 * shape.experts);
    *to = at == least ? low : at == most ? high : static_cast<float>(sum);
  }
}

}  // namespace swin_moe::cpu
