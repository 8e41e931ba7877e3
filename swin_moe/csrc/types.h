// The types shared by kernels and bindings. No torch headers here.
#pragma once

#include <cstdint>

namespace swin_moe {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// Sizes of one dispatch or combine. An assignment is one (token, choice) pair, numbered
// token * top_k + choice.
struct MoeShape {
  int64_t tokens;
  int64_t top_k;
  int64_t slots;
  int64_t width;
};

// Sizes of one routing, see swin_moe/ops/moe_route.py. Tokens are cut into equal groups, each with a
// queue per expert.
struct RouteShape {
  int64_t tokens;
  int64_t experts;
  int64_t top_k;
  int64_t groups;
  int64_t capacity;  // of a queue; 0 = no limit
  bool padded;

  int64_t group_tokens() const { return tokens / groups; }
  int64_t queues() const { return groups * experts; }  // group, expert
  int64_t rows() const {                               // of the experts' input
    const int64_t places = queues() * capacity, wanted = tokens * top_k;
    if (padded) return places;
    return capacity > 0 && places < wanted ? places : wanted;
  }
};

// The numbers of a routing that are not sizes.
struct RouteOptions {
  bool sigmoid;      // scores are sigmoids of the logits, otherwise their softmax
  bool normalize;    // gates are divided by their sum over a token's choices
  bool prioritized;  // queues are by descending priority, otherwise by index
  float load_sigma;  // of the gate noise, for the load estimate; 0 = no estimate
};

// Numbers about a routing that are no matrix: sum of squared logsumexp, sum of entropies, least and
// greatest logit, number of tokens that are not finite.
constexpr int64_t kRouteScalars = 5;
// The least sum of scores, as a divisor: the distance of 1 to the next fp32 number.
constexpr float kMinScoreSum = 1.1920929e-7f;
// A token's place in the order is by ascending key: kRouteLastKey less the bits of its best score,
// which are in the order of the scores, as no score is negative. A token that is not finite has
// kRouteNoKey and is in no queue.
constexpr uint32_t kRouteLastKey = 0x7fffffffu, kRouteNoKey = 0xffffffffu;

// Sizes of one pass through the experts. Expert e has its first row at e * stride, or with a stride
// of 0 where the rows of the one before end.
struct ExpertsShape {
  int64_t rows;
  int64_t experts;
  int64_t width;
  int64_t hidden;
  int64_t stride;
};

// Rows from number `first` on: a tensor of all rows, or scratch for some of them.
struct ExpertRows {
  void* data;
  int64_t first;
};

// Sizes of one attention within shifted windows. The map is padded at the bottom and the right to
// rows x columns windows; position (y, x) of the shifted, padded map is position
// ((y + shift_h) mod padded height, (x + shift_w) mod padded width) of the padded one.
struct WindowShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t heads;
  int64_t head_dim;
  int64_t window_h;
  int64_t window_w;
  int64_t shift_h;
  int64_t shift_w;

  int64_t rows() const { return (height + window_h - 1) / window_h; }
  int64_t columns() const { return (width + window_w - 1) / window_w; }
  int64_t windows() const { return batch * rows() * columns(); }  // image, row, column
  int64_t tokens() const { return window_h * window_w; }          // N, in one window
};

// The numbers of an attention that are not sizes.
struct WindowOptions {
  bool cosine;      // cosine attention, and `scale` is the logarithm of the factor
  double dropout;   // probability that a probability is dropped; 0 reads no seed
};

// The factor of cosine attention is exp(min(scale, kMaxLogScale)); ln 100.
constexpr float kMaxLogScale = 4.605170186f;
// Added to logits between regions that are not neighbours in the image.
constexpr float kMaskValue = -100.0f;
// Norms below this are taken for it, as torch.nn.functional.normalize does.
constexpr float kMinNorm = 1e-12f;

}  // namespace swin_moe
