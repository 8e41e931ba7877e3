// Backward: recomputes the probabilities, then the gradients of v, k, q and the bias.
//
// With P from the saved statistics and delta_i = dO_i . O_i (FlashAttention-2, appendix B):
//
//     dV_j = sum_i P dO_i      dP = dO_i . v_j      dS = P (dP - delta_i)
//     dk^_j = sum_i dS q^_i    dq^_i = sum_j dS k^_j    d bias = sum over windows of dS
//
// where ^ is the row as the scores saw it: of length one in cosine attention, whose gradient is then
// dq = (dq^ - q^ (q^ . dq^)) / |q|. Keys are worked on in blocks of kKeyBlock: P and dS of a block are
// stored twice, as rows of keys (for dV and dk^) and zipped over keys (for dq^, which is summed over
// blocks in fp32).
#pragma once

#include "window_attention.h"
#include "window_pack.h"

namespace swin_moe::cpu {
namespace {

template <class Isa, class T, int D>
class Backward {
  using L = Layout<Isa, T, D>;
  using P = Pack<Isa, T, D>;
  using Float = typename Isa::Float;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int64_t kKeyBlock = 64;

 public:
  Backward(const WindowShape& shape, const WindowOptions& options, const WindowBackward& tensors)
      : shape_(shape),
        options_(options),
        tensors_(tensors),
        layout_(shape),
        dropout_(options.dropout, tensors.seed) {
    Arena count{nullptr};
    take(count);
    Arena arena{thread_scratch(count.used)};
    take(arena);
    if constexpr (Isa::kTiles) {  // the ends of their rows, which stay
      std::memset(probabilities_, 0, kKeyBlock * layout_.lane_depth() * sizeof(T));
      std::memset(grad_scores_, 0, kKeyBlock * layout_.lane_depth() * sizeof(T));
    }
  }

  void run(Range units) {
    const int64_t groups = window_groups(shape_), windows = shape_.windows();
    int64_t loaded = -1;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int64_t group = unit % groups, end = (group + 1) * windows / groups;
      if (unit / groups != loaded) load_heads(loaded = unit / groups);
      for (head_ = heads_; head_ < heads_ + count_; ++head_) {
        std::memset(head_->grad_bias, 0, layout_.rows * layout_.lanes * sizeof(float));
        head_->grad_factor = 0;
      }
      for (int64_t window = group * windows / groups; window < end; ++window) {
        locate(shape_, window, tokens_);
        prefetch(window + 1 < end ? window + 1 : -1);
        for (head_ = heads_; head_ < heads_ + count_; ++head_) {
          pack(window);
          for (int64_t j = 0; j < layout_.rows; j += kKeyBlock) key_block(j);
          if constexpr (Isa::kTiles) {
            P::turn(reinterpret_cast<const uint32_t*>(turned_grad_query_), D, layout_.lanes,
                    reinterpret_cast<uint32_t*>(grad_query_));
          }
          head_->grad_factor += finish(0, rows_, query_norm_, grad_query_, layout_.lanes);
          finish(1, keys_, key_norm_, grad_key_, layout_.padded);
        }
      }
      for (head_ = heads_; head_ < heads_ + count_; ++head_) write_parts(group, groups);
    }
  }

 private:
  void take(Arena& arena) {
    const int64_t padded = layout_.padded, rows = layout_.rows, lanes = layout_.lanes;
    tokens_.index = arena.take<int64_t>(layout_.tokens);
    tokens_.region = arena.take<int32_t>(padded);
    ahead_.tokens.index = arena.take<int64_t>(layout_.tokens);
    ahead_.tokens.region = arena.take<int32_t>(padded);
    dropout_keys_ = arena.take<uint32_t>(padded);
    query_factor_ = arena.take<float>(padded);
    query_norm_ = arena.take<float>(padded);
    key_norm_ = arena.take<float>(padded);
    lse_ = arena.take<float>(padded);
    delta_ = arena.take<float>(padded);
    rows_ = arena.take<uint32_t>(padded * L::kStride);
    keys_ = arena.take<uint32_t>(padded * L::kStride);
    values_ = arena.take<uint32_t>(padded * L::kStride);
    out_rows_ = arena.take<uint32_t>(padded * L::kStride);
    grad_rows_ = arena.take<uint32_t>(padded * L::kStride);
    queries_ = arena.take<uint32_t>(lanes * L::kDepth);
    grads_ = arena.take<uint32_t>(lanes * L::kDepth);
    zipped_grads_ = arena.take<uint32_t>(padded / kPair<T> * D);
    zipped_queries_ = arena.take<uint32_t>(padded / kPair<T> * D);
    zipped_keys_ = arena.take<uint32_t>(padded / kPair<T> * D);
    probabilities_ = arena.take<T>(kKeyBlock * layout_.lane_depth());
    grad_scores_ = arena.take<T>(kKeyBlock * layout_.lane_depth());
    zipped_scores_ = arena.take<uint32_t>(kKeyBlock / kPair<T> * lanes);
    tile_ = arena.take<float>(8 * L::kBlock);
    grad_query_ = arena.take<float>(padded * D);
    grad_key_ = arena.take<float>(padded * D);
    if constexpr (Isa::kTiles) {
      turned_keys_ = arena.take<uint32_t>(padded / kPair<T> * D);
      turned_grad_query_ = arena.take<float>(lanes * D);
      products_ = arena.take<float>(kKeyBlock * L::kBlock);
    }
    for (int64_t head = 0; head < tensors_.groups.size; ++head) {
      heads_[head].bias = arena.take<float>(rows * lanes);
      heads_[head].grad_bias = arena.take<float>(rows * lanes);
    }
  }

  void load_heads(int64_t group) {
    const HeadGroups& groups = tensors_.groups;
    const int64_t first = group * groups.size, left = shape_.heads - first;
    const int64_t n = layout_.tokens;
    count_ = left < groups.size ? left : groups.size;
    for (int64_t i = 0; i < count_; ++i) {
      heads_[i].index = first + i;
      heads_[i].factor = score_factor(tensors_.scale[first + i], options_.cosine);
      P::bias(tensors_.bias + (first + i) * n * n, layout_, heads_[i].bias);
    }
  }

  void pack(int64_t window) {
    const int64_t head = head_->index;
    const int64_t part = shape_.heads * D, padded = layout_.padded;
    const T* map = static_cast<const T*>(tensors_.qkv) + head * D;
    P::rows(map, 3 * part, tokens_, layout_, padded, rows_);
    P::rows(map + part, 3 * part, tokens_, layout_, padded, keys_);
    P::rows(map + 2 * part, 3 * part, tokens_, layout_, padded, values_);
    P::rows(static_cast<const T*>(tensors_.out) + head * D, part, tokens_, layout_, padded,
            out_rows_);
    P::rows(static_cast<const T*>(tensors_.grad_out) + head * D, part, tokens_, layout_, padded,
            grad_rows_);
    P::inverse_norms(rows_, padded, options_.cosine, query_norm_);
    P::inverse_norms(keys_, padded, options_.cosine, key_norm_);
    P::dots(out_rows_, grad_rows_, padded, delta_);
    for (int64_t i = 0; i < layout_.lanes; i += kLanes) {
      Isa::store(Isa::load(query_norm_ + i) * (head_->factor * kLog2E), query_factor_ + i);
    }
    P::transpose(rows_, layout_, queries_);
    P::transpose(grad_rows_, layout_, grads_);
    P::zip(grad_rows_, layout_.lane_depth(), nullptr, zipped_grads_);
    P::zip(rows_, layout_.lane_depth(), query_norm_, zipped_queries_);
    P::zip(keys_, layout_.row_depth(), key_norm_, zipped_keys_);
    if constexpr (Isa::kTiles) {
      P::turn(zipped_keys_, layout_.row_depth() / kPair<T>, D, turned_keys_);
    }
    const int64_t n = layout_.tokens;
    std::memset(lse_, 0, padded * sizeof(float));
    std::memcpy(lse_, tensors_.lse + (window * shape_.heads + head) * n, n * sizeof(float));
    if (options_.dropout > 0) dropout_.keys(window * shape_.heads + head, n, dropout_keys_);
  }

  void prefetch(int64_t window) {
    ahead_.count = 0;
    if (window < 0) return ahead_.begin(0, 1);
    locate(shape_, window, ahead_.tokens);
    const int64_t row = D * sizeof(T), part = shape_.heads * row, width = count_ * row;
    const int64_t first = heads_[0].index * row;
    for (int i = 0; i < 3; ++i) ahead_.add(tensors_.qkv, first + i * part, 3 * part, width);
    ahead_.add(tensors_.out, first, part, width);
    ahead_.add(tensors_.grad_out, first, part, width);
    ahead_.begin(layout_.tokens, count_ * layout_.tiles());
  }

  // Everything that the keys [first, first + kKeyBlock) take part in.
  void key_block(int64_t first) {
    const int64_t left = layout_.rows - first;
    const int64_t count = left < kKeyBlock ? left : kKeyBlock;
    for (int64_t lane = 0; lane < layout_.lanes; lane += L::kBlock) {
      const int64_t width = layout_.block_width(lane);
      if (width == L::kBlock) {
        differentiate<L::kVectors>(lane, first, count);
      } else if (width == kLanes) {
        differentiate<1>(lane, first, count);
      } else if (width == 2 * kLanes) {
        differentiate<2>(lane, first, count);
      } else {
        differentiate<3>(lane, first, count);
      }
    }
    multiply(first, count);
  }

  // P and dS of `count` keys for a block of queries.
  template <int NV>
  void differentiate(int64_t lane, int64_t first, int64_t count) {
    constexpr int MR = NV * 4 <= L::kVectors * 2 ? 8 : 4;
    constexpr int64_t kWidth = NV * kLanes;
    const uint32_t* queries = queries_ + layout_.block(lane, L::kDepth);
    const uint32_t* grads = grads_ + layout_.block(lane, L::kDepth);
    for (int64_t j = first; j < first + count; j += MR) {
      Float acc[MR][NV];
      ahead_.step();
      if constexpr (Isa::kTiles) {
        Strips<Isa, L>{keys_, queries, products_, first, first + count}.tile(j, acc);
        recompute<MR, NV>(lane, first, j, acc);
        float* products = products_ + kKeyBlock / 2 * L::kBlock;
        Strips<Isa, L>{values_, grads, products, first, first + count}.tile(j, acc);
      } else {
        score_tile<Isa, T, L::kWords>(keys_ + j * L::kStride, L::kStride, queries, kWidth, acc);
        recompute<MR, NV>(lane, first, j, acc);
        score_tile<Isa, T, L::kWords>(values_ + j * L::kStride, L::kStride, grads, kWidth, acc);
      }
      grad_score<MR, NV>(lane, first, j, acc);
    }
  }

  // Scores to probabilities: fp32 to the tile, dropped and rounded to the rows of keys.
  template <int MR, int NV>
  SWIN_MOE_INLINE void recompute(int64_t lane, int64_t first, int64_t j, Float (&acc)[MR][NV]) {
    constexpr int64_t kWidth = NV * kLanes;
    const float* bias = head_->bias + layout_.block(lane, layout_.rows) + j * kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Float key_norm = Isa::set(key_norm_[j + r]);
      T* row = probabilities_ + (j - first + r) * layout_.lane_depth() + lane;
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        const int64_t at = lane + n * kLanes;
        Float score =
            Isa::fma(acc[r][n] * key_norm, Isa::load(query_factor_ + at),
                     Isa::load(bias + r * kWidth + n * kLanes) - Isa::load(lse_ + at));
        if (tokens_.masked) score += mask(j + r, at);
        Float p = exp2<Isa, T>(Isa::max(Isa::set(kLowest), score));
        Isa::store(p, tile_ + r * kWidth + n * kLanes);
        if (options_.dropout > 0) {
          p *= dropout_.template keep<Isa>(dropout_keys_ + at, j + r);
        }
        Isa::store_row(p, row + n * kLanes);
      }
    }
  }

  SWIN_MOE_INLINE Float mask(int64_t j, int64_t lane) const {
    const int32_t region = j < layout_.tokens ? tokens_.region[j] : -1;
    return penalty<Isa>(region, tokens_.region + lane);
  }

  // dP to dS, in fp32 for the bias and rounded for the products.
  template <int MR, int NV>
  SWIN_MOE_INLINE void grad_score(int64_t lane, int64_t first, int64_t j, Float (&acc)[MR][NV]) {
    constexpr int64_t kWidth = NV * kLanes;
    float* grad_bias = head_->grad_bias + layout_.block(lane, layout_.rows) + j * kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        const int64_t at = lane + n * kLanes;
        if (options_.dropout > 0) {
          acc[r][n] *= dropout_.template keep<Isa>(dropout_keys_ + at, j + r);
        }
        acc[r][n] = (acc[r][n] - Isa::load(delta_ + at)) *
                    Isa::load(tile_ + r * kWidth + n * kLanes);
        float* sum = grad_bias + r * kWidth + n * kLanes;
        Isa::store(Isa::load(sum) + acc[r][n], sum);
      }
      if (r % kPair<T> == kPair<T> - 1) {
        store_scores<NV>(j + r - first, lane, acc[r - kPair<T> + 1], acc[r]);
      }
    }
  }

  template <int NV>
  SWIN_MOE_INLINE void store_scores(int64_t row, int64_t lane, const Float (&low)[NV],
                                    const Float (&high)[NV]) {
    T* to = grad_scores_ + row * layout_.lane_depth() + lane;
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n, to += kLanes) {
      if constexpr (kPair<T> == 1) {
        Isa::store_row(high[n], to);
      } else {
        Isa::store(Isa::template store_rows<Isa>(low[n], high[n], to - layout_.lane_depth(), to),
                   zipped_scores_ + row / 2 * layout_.lanes + lane + n * kLanes);
      }
    }
  }

  // The three products of a key block.
  void multiply(int64_t first, int64_t count) {
    if constexpr (Isa::kTiles) return multiply_matrices(first, count);
    constexpr int R = kProductRows<Isa, D>;
    const int64_t row_words = layout_.lanes / kPair<T>, words = row_words;
    const int64_t part = shape_.heads * D;
    T* grad_v = static_cast<T*>(tensors_.grad_qkv) + 2 * part + head_->index * D;
    for (int64_t j = 0; j < count; j += R) {
      product_tile<Isa, T, D>(
          reinterpret_cast<const uint32_t*>(probabilities_) + j * row_words, row_words, 1,
          zipped_grads_, words, nullptr,
          [&](int r, const Float(&acc)[D / kLanes]) SWIN_MOE_LAMBDA {
            const int64_t t = first + j + r;
            if (t >= layout_.tokens || tokens_.index[t] < 0) return;
            for (int v = 0; v < D / kLanes; ++v) {
              Isa::store_row(acc[v], grad_v + tokens_.index[t] * 3 * part + v * kLanes);
            }
          });
      product_tile<Isa, T, D>(
          reinterpret_cast<const uint32_t*>(grad_scores_) + j * row_words, row_words, 1,
          zipped_queries_, words, nullptr,
          [&](int r, const Float(&acc)[D / kLanes]) SWIN_MOE_LAMBDA {
            store_fp32(acc, grad_key_ + (first + j + r) * D);
          });
    }
    const uint32_t* zipped = kPair<T> == 1 ? reinterpret_cast<const uint32_t*>(grad_scores_)
                                           : zipped_scores_;
    for (int64_t i = 0; i < layout_.lanes; i += R) {
      float* sum = grad_query_ + i * D;
      product_tile<Isa, T, D>(zipped + i, 1, layout_.lanes, zipped_keys_ + first / kPair<T> * D,
                              count / kPair<T>, first == 0 ? nullptr : sum,
                              [&](int r, const Float(&acc)[D / kLanes]) SWIN_MOE_LAMBDA {
                                store_fp32(acc, sum + r * D);
                              });
    }
  }

  // The same by matrices; zipped operands are on the right, and dq^ is transposed later.
  void multiply_matrices(int64_t first, int64_t count) {
    const int64_t words = layout_.lane_depth() / 2, lanes = layout_.lanes;
    Isa::multiply({reinterpret_cast<const uint32_t*>(probabilities_), words, zipped_grads_, D,
                   words, products_, D, /*add=*/false},
                  count, D);
    const int64_t part = shape_.heads * D;
    T* grad_v = static_cast<T*>(tensors_.grad_qkv) + 2 * part + head_->index * D;
    for (int64_t j = 0; j < count && first + j < layout_.tokens; ++j) {
      const int64_t index = tokens_.index[first + j];
      for (int d = 0; d < D && index >= 0; d += kLanes) {
        Isa::store_row(Isa::load(products_ + j * D + d), grad_v + index * 3 * part + d);
      }
    }
    Isa::multiply({reinterpret_cast<const uint32_t*>(grad_scores_), words, zipped_queries_, D,
                   words, grad_key_ + first * D, D, /*add=*/false},
                  count, D);
    const int64_t depth = round_up(count, 32) / 2;
    std::memset(zipped_scores_ + count / 2 * lanes, 0,
                (depth - count / 2) * lanes * sizeof(uint32_t));
    Isa::multiply({turned_keys_ + first / 2, layout_.row_depth() / 2, zipped_scores_, lanes, depth,
                   turned_grad_query_, lanes, /*add=*/first != 0},
                  D, lanes);
  }

  SWIN_MOE_INLINE static void store_fp32(const Float (&acc)[D / kLanes], float* to) {
    for (int v = 0; v < D / kLanes; ++v) Isa::store(acc[v], to + v * kLanes);
  }

  // Turns the gradients of `count` unit rows into those of q (part 0) or k (part 1). Returns
  // Σ unit row · its gradient, from which follows the gradient of the factor.
  double finish(int64_t part, const uint32_t* rows, const float* norms, const float* grads,
                int64_t count) {
    const int64_t width = shape_.heads * D;
    const float factor = head_->factor;
    T* to = static_cast<T*>(tensors_.grad_qkv) + part * width + head_->index * D;
    double sum = 0;
    for (int64_t first = 0; first < count; first += kLanes) {
      float along[kLanes];  // unit row . its gradient, without the factor
      unit_dots(rows, norms, grads, first, along);
      for (int64_t t = first; t < first + kLanes && t < layout_.tokens; ++t) {
        if (tokens_.index[t] < 0) continue;
        sum += along[t - first];
        const T* row = reinterpret_cast<const T*>(rows + t * L::kStride);
        const Float norm = Isa::set(norms[t]);
        const bool tiny = norms[t] >= 1 / kMinNorm;  // its length is taken for a constant
        const Float radial = Isa::set(options_.cosine && !tiny ? along[t - first] : 0.0f);
        T* target = to + tokens_.index[t] * 3 * width;
        for (int d = 0; d < D; d += kLanes) {
          const Float unit = Isa::load_row(row + d) * norm;
          const Float tangent = Isa::load(grads + t * D + d) - unit * radial;
          Isa::store_row(tangent * norm * factor, target + d);
        }
      }
    }
    return sum;
  }

  SWIN_MOE_INLINE void unit_dots(const uint32_t* rows, const float* norms, const float* grads,
                                 int64_t first, float (&to)[kLanes]) {
    Float partial[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const T* row = reinterpret_cast<const T*>(rows + (first + r) * L::kStride);
      const float* grad = grads + (first + r) * D;
      partial[r] = Float{};
      for (int d = 0; d < D; d += kLanes) {
        partial[r] = Isa::fma(Isa::load_row(row + d), Isa::load(grad + d), partial[r]);
      }
    }
    Isa::store(Isa::sums(partial) * Isa::load(norms + first), to);
  }

  void write_parts(int64_t group, int64_t groups) {
    const int64_t part = head_->index * groups + group, n = layout_.tokens;
    write_bias(tensors_.grad_bias + part * n * n);
    const bool clamped = options_.cosine && !(tensors_.scale[head_->index] < kMaxLogScale);
    const double slope = options_.cosine ? head_->factor : 1.0;
    tensors_.grad_scale[part] = clamped ? 0.0f : static_cast<float>(slope * head_->grad_factor);
  }

  // The part of a group: blocks [rows][lanes], key by query, to [N, N], query by key.
  void write_bias(float* to) {
    const int64_t n = layout_.tokens;
    for (int64_t lane = 0; lane < layout_.lanes; lane += L::kBlock) {
      const int64_t width = layout_.block_width(lane);
      const float* block = head_->grad_bias + layout_.block(lane, layout_.rows);
      for (int64_t i = 0; i < width && lane + i < n; i += kLanes) {
        for (int64_t j = 0; j < n; j += kLanes) {
          typename Isa::Word square[kLanes];
          for (int r = 0; r < kLanes; ++r) {
            square[r] = j + r < n ? Isa::as_word(Isa::load(block + (j + r) * width + i))
                                  : typename Isa::Word{};
          }
          Isa::transpose(square);
          const int64_t bytes = (n - j < kLanes ? n - j : kLanes) * sizeof(float);
          for (int r = 0; r < kLanes && lane + i + r < n; ++r) {
            std::memcpy(to + (lane + i + r) * n + j, &square[r], bytes);
          }
        }
      }
    }
  }

  const WindowShape& shape_;
  const WindowOptions& options_;
  const WindowBackward& tensors_;
  const L layout_;
  const Dropout dropout_;

  // The values kept for each head of the group.
  struct Head {
    int64_t index;
    float factor;        // of its scores
    float* bias;         // blocks of [rows][lanes]
    float* grad_bias;    // the same, over a group of windows
    double grad_factor;
  };
  Head heads_[kMaxHeadsTogether];
  int64_t count_ = 0;     // of heads in the group
  Head* head_ = nullptr;  // the one at work

  // Scratch of one window and head; rows are [padded][kStride].
  Tokens tokens_{};
  Prefetch ahead_{};
  uint32_t* dropout_keys_ = nullptr;
  float *query_factor_ = nullptr, *query_norm_ = nullptr, *key_norm_ = nullptr;
  float *lse_ = nullptr, *delta_ = nullptr;
  uint32_t *rows_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
  uint32_t *out_rows_ = nullptr, *grad_rows_ = nullptr;
  uint32_t *queries_ = nullptr, *grads_ = nullptr;  // blocks of [kDepth][lanes]: q and dO
  uint32_t *zipped_grads_ = nullptr, *zipped_queries_ = nullptr, *zipped_keys_ = nullptr;
  T *probabilities_ = nullptr, *grad_scores_ = nullptr;  // [kKeyBlock][lanes]
  uint32_t* zipped_scores_ = nullptr;                    // [kKeyBlock / kPair][lanes]
  float* tile_ = nullptr;                                // P of one tile
  float *grad_query_ = nullptr, *grad_key_ = nullptr;    // [padded][D], of unit rows

  // Where matrices are multiplied.
  uint32_t* turned_keys_ = nullptr;      // [D][padded / kPair], from zipped_keys_
  float* turned_grad_query_ = nullptr;   // [D][lanes]
  float* products_ = nullptr;            // strips of scores and of dP, then a block of dV
};

}  // namespace
}  // namespace swin_moe::cpu
