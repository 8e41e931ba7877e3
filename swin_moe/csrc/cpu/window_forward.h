// Forward: scores, softmax and output of a block of queries at a time.
#pragma once

#include "window_attention.h"
#include "window_pack.h"

namespace swin_moe::cpu {
namespace {

template <class Isa, class T, int D>
class Forward {
  using L = Layout<Isa, T, D>;
  using P = Pack<Isa, T, D>;
  using Float = typename Isa::Float;
  static constexpr int kLanes = Isa::kLanes;

 public:
  Forward(const WindowShape& shape, const WindowOptions& options, const WindowForward& tensors)
      : shape_(shape),
        options_(options),
        tensors_(tensors),
        layout_(shape),
        dropout_(options.dropout, tensors.seed) {
    Arena count{nullptr};
    take(count);
    Arena arena{thread_scratch(count.used)};
    take(arena);
  }

  void run(Range units) {
    const int64_t windows = shape_.windows();
    int64_t loaded = -1;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int64_t group = unit / windows, window = unit % windows;
      if (group != loaded) load_heads(loaded = group);
      locate(shape_, window, tokens_);
      prefetch(window + 1 < windows && unit + 1 < units.end ? window + 1 : -1);
      for (head_ = heads_; head_ < heads_ + count_; ++head_) {
        pack(window);
        for (int64_t lane = 0; lane < layout_.lanes; lane += L::kBlock) {
          // Wide blocks take few rows to a tile and narrow ones many: the registers are the same.
          switch (layout_.block_width(lane) / kLanes) {
            case 1: attend<1>(window, lane); break;
            case 2: attend<2>(window, lane); break;
            case 3: attend<3>(window, lane); break;
            default: attend<L::kVectors>(window, lane);
          }
        }
      }
    }
  }

 private:
  void take(Arena& arena) {
    tokens_.index = arena.take<int64_t>(layout_.tokens);
    tokens_.region = arena.take<int32_t>(layout_.padded);
    ahead_.tokens.index = arena.take<int64_t>(layout_.tokens);
    ahead_.tokens.region = arena.take<int32_t>(layout_.padded);
    dropout_keys_ = arena.take<uint32_t>(layout_.padded);
    query_factor_ = arena.take<float>(layout_.padded);
    key_factor_ = arena.take<float>(layout_.padded);
    rows_ = arena.take<uint32_t>(layout_.padded * L::kStride);
    keys_ = arena.take<uint32_t>(layout_.padded * L::kStride);
    queries_ = arena.take<uint32_t>(layout_.lanes * L::kDepth);
    values_ = arena.take<uint32_t>(layout_.row_depth() / kPair<T> * D);
    probabilities_ = arena.take<uint32_t>(layout_.row_depth() / kPair<T> * L::kBlock);
    if constexpr (Isa::kTiles) {
      turned_values_ = arena.take<uint32_t>(layout_.row_depth() / kPair<T> * D);
      products_ = arena.take<float>((D > 32 ? D : 32) * L::kBlock);
    }
    scores_ = arena.take<float>(layout_.rows * L::kBlock);
    for (int64_t head = 0; head < tensors_.groups.size; ++head) {
      heads_[head].offset = arena.take<float>(layout_.padded);
      heads_[head].bias = arena.take<float>(layout_.rows * layout_.lanes);
    }
  }

  void load_heads(int64_t group) {
    const HeadGroups& groups = tensors_.groups;
    const int64_t first = group * groups.size, left = shape_.heads - first;
    count_ = left < groups.size ? left : groups.size;
    for (head_ = heads_; head_ < heads_ + count_; ++head_) load_head(first + (head_ - heads_));
  }

  // Packs the bias of a head, and sees whether its exponents are known to stay in range: those of
  // cosine attention are at most factor + bias. Then that bound stands in for the largest score.
  void load_head(int64_t index) {
    const int64_t n = layout_.tokens;
    Head& head = *head_;
    head.index = index;
    head.factor = score_factor(tensors_.scale[index], options_.cosine);
    P::bias(tensors_.bias + index * n * n, layout_, head.bias);
    head.bounded = options_.cosine;
    for (int64_t lane = 0; lane < layout_.lanes && head.bounded; lane += kLanes) bound(lane);
    for (int64_t lane = 0; lane < layout_.lanes; lane += kLanes) {
      if (!head.bounded) Isa::store(Float{}, head.offset + lane);
      const Float offset = Isa::load(head.offset + lane);
      float* column = layout_.column(head.bias, lane);
      for (int64_t j = 0; j < layout_.rows && head.bounded; ++j) {
        float* at = column + j * layout_.block_width_of(lane);
        Isa::store(Isa::max(Isa::set(kLowest), Isa::load(at) - offset), at);
      }
    }
  }

  // The bound of a vector of queries; none if their bias holds anything but numbers.
  void bound(int64_t lane) {
    const float* column = layout_.column(head_->bias, lane);
    Float low = Isa::load(column), high = low, finite = Float{};
    for (int64_t j = 0; j < layout_.tokens; ++j) {
      const Float value = Isa::load(column + j * layout_.block_width_of(lane));
      low = value < low ? value : low;
      high = Isa::max(value, high);
      finite = Isa::fma(value, Float{}, finite);
    }
    const Float range = high - low + 2 * head_->factor * kLog2E + finite;
    Isa::store(high + head_->factor * kLog2E, head_->offset + lane);
    for (int i = 0; i < kLanes; ++i) head_->bounded &= range[i] < kSafeRange;  // not for a NaN either
  }

  void pack(int64_t window) {
    const T* map = static_cast<const T*>(tensors_.qkv) + head_->index * D;
    const int64_t part = shape_.heads * D, step = 3 * part;
    P::rows(map, step, tokens_, layout_, layout_.lanes, rows_);
    P::inverse_norms(rows_, layout_.lanes, options_.cosine, query_factor_);
    for (int64_t i = 0; i < layout_.lanes; i += kLanes) {
      Isa::store(Isa::load(query_factor_ + i) * (head_->factor * kLog2E), query_factor_ + i);
    }
    P::transpose(rows_, layout_, queries_);
    P::rows(map + part, step, tokens_, layout_, layout_.padded, keys_);
    P::inverse_norms(keys_, layout_.padded, options_.cosine, key_factor_);
    P::rows(map + 2 * part, step, tokens_, layout_, layout_.row_depth(), rows_);
    P::zip(rows_, layout_.row_depth(), nullptr, values_);
    if constexpr (Isa::kTiles) {
      P::turn(values_, layout_.row_depth() / kPair<T>, D, turned_values_);
    }
    if (options_.dropout > 0) {
      dropout_.keys(window * shape_.heads + head_->index, layout_.tokens, dropout_keys_);
    }
  }

  void prefetch(int64_t window) {
    ahead_.count = 0;
    if (window < 0) return ahead_.begin(0, 1);
    locate(shape_, window, ahead_.tokens);
    const int64_t row = D * sizeof(T), part = shape_.heads * row;
    for (int i = 0; i < 3; ++i) {
      ahead_.add(tensors_.qkv, heads_[0].index * row + i * part, 3 * part, count_ * row);
    }
    ahead_.begin(layout_.tokens, count_ * layout_.tiles());
  }

  template <int NV>
  void attend(int64_t window, int64_t lane) {
    Float largest[NV], sum[NV];
    for (int n = 0; n < NV; ++n) {
      largest[n] = Isa::set(-__builtin_inff());
      sum[n] = Float{};
    }
    const bool at_once = head_->bounded && options_.dropout == 0;
    if (at_once && !tokens_.masked) {
      score<NV, /*kAtOnce=*/true, /*kMasked=*/false>(lane, largest, sum);
    } else if (at_once) {
      score<NV, /*kAtOnce=*/true, /*kMasked=*/true>(lane, largest, sum);
    } else {
      score<NV, /*kAtOnce=*/false, /*kMasked=*/true>(lane, largest, sum);
      exponentiate<NV>(lane, largest, sum);
    }
    if (head_->bounded) {
      for (int n = 0; n < NV; ++n) {
        const Float offset = Isa::load(head_->offset + lane + n * kLanes);
        largest[n] = at_once ? offset : largest[n] + offset;
      }
    }
    float inverse[NV * kLanes], lse[NV * kLanes];
    for (int n = 0; n < NV; ++n) {
      Isa::store(1.0f / sum[n], inverse + n * kLanes);
      Isa::store(largest[n] + log2<Isa>(sum[n]), lse + n * kLanes);
    }
    float* to = tensors_.lse + (window * shape_.heads + head_->index) * layout_.tokens + lane;
    const int64_t left = layout_.tokens - lane;
    std::memcpy(to, lse, (left < NV * kLanes ? left : NV * kLanes) * sizeof(float));
    write_output(lane, NV * kLanes, inverse);
  }

  // Scores of all keys for a block of queries. Bounded ones become probabilities at once.
  template <int NV, bool kAtOnce, bool kMasked>
  SWIN_MOE_INLINE void score(int64_t lane, Float (&largest)[NV], Float (&sum)[NV]) {
    constexpr int MR = NV * 4 <= L::kVectors * 2 ? 8 : 4;
    const uint32_t* queries = queries_ + layout_.block(lane, L::kDepth);
    const float* bias = head_->bias + layout_.block(lane, layout_.rows);
    constexpr int64_t kWidth = NV * kLanes;
    for (int64_t j = 0; j < layout_.rows; j += MR) {
      Float acc[MR][NV];
      ahead_.step();
      if constexpr (Isa::kTiles) {
        Strips<Isa, L>{keys_, queries, products_, 0, layout_.rows}.tile(j, acc);
      } else {
        score_tile<Isa, T, L::kWords>(keys_ + j * L::kStride, L::kStride, queries, kWidth, acc);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const Float key_factor = Isa::set(key_factor_[j + r]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
          acc[r][n] = Isa::fma(acc[r][n] * key_factor,
                               Isa::load(query_factor_ + lane + n * kLanes),
                               Isa::load(bias + (j + r) * kWidth + n * kLanes));
          if (kMasked && tokens_.masked) acc[r][n] += mask(j + r, lane + n * kLanes);
          if constexpr (kAtOnce) {
            if (kMasked) acc[r][n] = Isa::max(Isa::set(kLowest), acc[r][n]);
            acc[r][n] = exp2<Isa, T>(acc[r][n]);
            sum[n] += acc[r][n];
          } else {
            largest[n] = Isa::max(largest[n], acc[r][n]);
            Isa::store(acc[r][n], scores_ + (j + r) * kWidth + n * kLanes);
          }
        }
        if constexpr (kAtOnce) {
          if (r % kPair<T> == kPair<T> - 1) keep<NV>(j + r, acc[r - kPair<T> + 1], acc[r]);
        }
      }
    }
  }

  SWIN_MOE_INLINE Float mask(int64_t j, int64_t lane) const {
    const int32_t region = j < layout_.tokens ? tokens_.region[j] : -1;
    return penalty<Isa>(region, tokens_.region + lane);
  }

  // Stores the probabilities of row j (and the one before it), zipped into words.
  template <int NV>
  SWIN_MOE_INLINE void keep(int64_t j, const Float (&low)[NV], const Float (&high)[NV]) {
    uint32_t* to = probabilities_ + j / kPair<T> * NV * kLanes;
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      if constexpr (kPair<T> == 1) {
        Isa::store(Isa::as_word(high[n]), to + n * kLanes);
      } else {
        Isa::store(Isa::zip_round(low[n], high[n]), to + n * kLanes);
      }
    }
  }

  // From stored scores to probabilities, once the largest score of each query is known.
  template <int NV>
  SWIN_MOE_INLINE void exponentiate(int64_t lane, Float (&largest)[NV], Float (&sum)[NV]) {
    constexpr int64_t kWidth = NV * kLanes;
    for (int64_t j = 0; j < layout_.rows; j += kPair<T>) {
      Float p[2][NV];
      for (int r = 0; r < kPair<T>; ++r) {
        for (int n = 0; n < NV; ++n) {
          const Float score = Isa::load(scores_ + (j + r) * kWidth + n * kLanes);
          const Float value =
              exp2<Isa, T>(Isa::max(Isa::set(kLowest), score - largest[n]));
          sum[n] += value;
          p[r][n] = value;
          if (options_.dropout > 0) {
            p[r][n] *=
                dropout_.template keep<Isa>(dropout_keys_ + lane + n * kLanes, j + r);
          }
        }
      }
      keep<NV>(j + kPair<T> - 1, p[0], p[kPair<T> - 1]);
    }
  }

  // O = P . V for the block, each query divided by its sum and stored where it came from.
  void write_output(int64_t lane, int64_t width, const float* inverse) {
    if constexpr (Isa::kTiles) return write_turned_output(lane, width, inverse);
    constexpr int R = kProductRows<Isa, D>;
    T* out = static_cast<T*>(tensors_.out) + head_->index * D;
    const int64_t step = shape_.heads * D;
    for (int64_t i = 0; i < width; i += R) {
      product_tile<Isa, T, D>(
          probabilities_ + i, 1, width, values_, layout_.rows / kPair<T>, nullptr,
          [&](int r, const Float(&acc)[D / kLanes]) SWIN_MOE_LAMBDA {
            const int64_t t = lane + i + r;
            if (t >= layout_.tokens || tokens_.index[t] < 0) return;
            const Float factor = Isa::set(inverse[i + r]);
            for (int v = 0; v < D / kLanes; ++v) {
              Isa::store_row(acc[v] * factor, out + tokens_.index[t] * step + v * kLanes);
            }
          });
    }
  }

  // The same by matrices, as O^T = V^T . P: the probabilities are zipped as the right side of a
  // product is, and V is less to turn than they are.
  void write_turned_output(int64_t lane, int64_t width, const float* inverse) {
    const int64_t used = layout_.rows / kPair<T>, words = layout_.row_depth() / kPair<T>;
    std::memset(probabilities_ + used * width, 0, (words - used) * width * sizeof(uint32_t));
    Isa::multiply({turned_values_, words, probabilities_, width, words, products_, width,
                   /*add=*/false},
                  D, width);
    const int64_t step = shape_.heads * D;
    for (int64_t i = 0; i < width; i += kLanes) {
      for (int64_t d = 0; d < D; d += kLanes) {
        T* out = static_cast<T*>(tensors_.out) + head_->index * D + d;
        typename Isa::Word square[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          square[r] = Isa::as_word(Isa::load(products_ + (d + r) * width + i));
        }
        Isa::transpose(square);
        for (int r = 0; r < kLanes; ++r) {
          const int64_t t = lane + i + r;
          if (t >= layout_.tokens || tokens_.index[t] < 0) continue;
          const Float factor = Isa::set(inverse[i + r]);
          Isa::store_row(Isa::as_float(square[r]) * factor, out + tokens_.index[t] * step);
        }
      }
    }
  }

  const WindowShape& shape_;
  const WindowOptions& options_;
  const WindowForward& tensors_;
  const L layout_;
  const Dropout dropout_;

  // The values kept for each head of the group.
  struct Head {
    int64_t index;
    float factor;   // of its scores
    bool bounded;   // exponents are known to stay within kSafeRange below `offset`
    float* offset;  // [lanes] the bound of each query's scores
    float* bias;    // blocks of [rows][lanes]
  };
  Head heads_[kMaxHeadsTogether];
  int64_t count_ = 0;     // of heads in the group
  Head* head_ = nullptr;  // the one at work

  // Scratch of one window and head.
  Tokens tokens_{};
  Prefetch ahead_{};
  uint32_t* dropout_keys_ = nullptr;
  float* query_factor_ = nullptr;      // [lanes] factor log2(e) / |q|
  float* key_factor_ = nullptr;        // [padded] 1 / |k|
  uint32_t* rows_ = nullptr;           // [padded][kStride] of q, then of v
  uint32_t* keys_ = nullptr;           // [padded][kStride]
  uint32_t* queries_ = nullptr;        // blocks of [kDepth][lanes]
  uint32_t* values_ = nullptr;         // [rows / kPair][D]
  uint32_t* probabilities_ = nullptr;  // [rows / kPair][block], not divided by their sum
  float* scores_ = nullptr;            // [rows][block]

  // Where matrices are multiplied.
  uint32_t* turned_values_ = nullptr;  // [D][padded / kPair], from values_
  float* products_ = nullptr;          // strips of scores, then O^T [D][block]
};

}  // namespace
}  // namespace swin_moe::cpu
