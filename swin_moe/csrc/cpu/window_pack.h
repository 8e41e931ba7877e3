// From the feature map to scratch: rows of one head, transposed, zipped and measured.
#pragma once

#include "window_tiles.h"

namespace swin_moe::cpu {
namespace {

template <class Isa, class T, int D>
struct Pack {
  using L = Layout<Isa, T, D>;
  using Float = typename Isa::Float;
  using Word = typename Isa::Word;
  static constexpr int kLanes = Isa::kLanes;

  // Copies the tokens' rows, `step` elements apart in the map, to [count][kStride] words; zeros for
  // padding and up to `count`.
  static void rows(const T* map, int64_t step, const Tokens& tokens, const L& layout,
                   int64_t count, uint32_t* to) {
    for (int64_t t = 0; t < count; ++t, to += L::kStride) {
      const bool real = t < layout.tokens && tokens.index[t] >= 0;
      if (real && L::kWords == L::kStride) {
        std::memcpy(to, map + tokens.index[t] * step, L::kWords * sizeof(uint32_t));
        continue;
      }
      std::memset(to, 0, L::kStride * sizeof(uint32_t));
      if (real) std::memcpy(to, map + tokens.index[t] * step, L::kWords * sizeof(uint32_t));
    }
  }

  // Rows [lanes][kStride] to blocks of [kDepth][lanes of the block].
  static void transpose(const uint32_t* from, const L& layout, uint32_t* to) {
    for (int64_t lane = 0; lane < layout.lanes; lane += L::kBlock) {
      const int64_t width = layout.block_width(lane);
      for (int64_t i = 0; i < width; i += kLanes) {
        for (int w = 0; w < L::kWords; w += kLanes) {
          Word square[kLanes];
          for (int r = 0; r < kLanes; ++r) {
            square[r] = Isa::load(from + (lane + i + r) * L::kStride + w);
          }
          Isa::transpose(square);
          uint32_t* corner = to + layout.block(lane, L::kDepth) + w * width + i;
          for (int r = 0; r < kLanes && w + r < L::kDepth; ++r) {
            Isa::store(square[r], corner + r * width);
          }
        }
      }
    }
  }

  // [rows][columns] to [columns][rows], both multiples of kLanes.
  static void turn(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        Word square[kLanes];
        for (int r = 0; r < kLanes; ++r) square[r] = Isa::load(from + (i + r) * columns + j);
        Isa::transpose(square);
        for (int r = 0; r < kLanes; ++r) Isa::store(square[r], to + (j + r) * rows + i);
      }
    }
  }

  // dots[t] = a_t . b_t in fp32 for rows of words, a multiple of kLanes of them.
  static void dots(const uint32_t* a, const uint32_t* b, int64_t count, float* to) {
    for (int64_t t = 0; t < count; t += kLanes) {
      Float partial[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        partial[r] = Float{};
        for (int w = 0; w < L::kStride; w += kLanes) {
          const int64_t at = (t + r) * L::kStride + w;
          partial[r] =
              Isa::template dot<T, Isa>(partial[r], Isa::load(a + at), Isa::load(b + at));
        }
      }
      Isa::store(Isa::sums(partial), to + t);
    }
  }

  // 1 / max(|row|, kMinNorm), or 1 where there is no cosine.
  static void inverse_norms(const uint32_t* from, int64_t count, bool cosine, float* to) {
    if (cosine) dots(from, from, count, to);
    for (int64_t t = 0; t < count; t += kLanes) {
      Float norm = Isa::set(1.0f);
      if (cosine) norm = Isa::max(Isa::set(kMinNorm), Isa::sqrt(Isa::load(to + t)));
      Isa::store(1.0f / norm, to + t);
    }
  }

  // Rows [count][kStride] to words [count / kPair][D] over the rows, each times its factor if
  // there are factors.
  static void zip(const uint32_t* from, int64_t count, const float* factors, uint32_t* to) {
    const T* row = reinterpret_cast<const T*>(from);
    constexpr int64_t kStep = L::kStride * kPair<T>;  // elements between rows
    for (int64_t t = 0; t < count; t += kPair<T>, to += D) {
      const T* low = row + t * kStep;
      for (int d = 0; d < D; d += kLanes) {
        if constexpr (kPair<T> == 1) {
          Float value = Isa::load_row(low + d);
          if (factors != nullptr) value *= Isa::set(factors[t]);
          Isa::store(value, reinterpret_cast<float*>(to) + d);
        } else if (factors == nullptr) {
          Isa::store(Isa::zip(low + d, low + kStep + d), to + d);
        } else {
          const Float a = Isa::load_row(low + d) * Isa::set(factors[t]);
          const Float b = Isa::load_row(low + kStep + d) * Isa::set(factors[t + 1]);
          Isa::store(Isa::zip_round(a, b), to + d);
        }
      }
    }
  }

  // The bias of one head [N, N], query by key, to blocks of [rows][lanes]: transposed, in units of
  // log2. Rows of padding get -infinity, lanes of padding 0.
  static void bias(const float* from, const L& layout, float* to) {
    const int64_t n = layout.tokens;
    for (int64_t lane = 0; lane < layout.lanes; lane += L::kBlock) {
      const int64_t width = layout.block_width(lane);
      for (int64_t i = 0; i < width; i += kLanes) {
        float* column = to + layout.block(lane, layout.rows) + i;
        for (int64_t j = 0; j < layout.rows; j += kLanes) {
          Word square[kLanes];
          for (int r = 0; r < kLanes; ++r) square[r] = bias_row(from, n, lane + i + r, j);
          Isa::transpose(square);
          for (int r = 0; r < kLanes && j + r < layout.rows; ++r) {
            const Float value = Isa::as_float(square[r]) * kLog2E;
            Isa::store(j + r < n ? value : Isa::set(-__builtin_inff()), column + (j + r) * width);
          }
        }
      }
    }
  }

 private:
  static SWIN_MOE_INLINE Word bias_row(const float* from, int64_t n, int64_t i, int64_t j) {
    Word row{};
    if (i >= n || j >= n) return row;
    if (j + kLanes <= n) return Isa::as_word(Isa::load(from + i * n + j));
    std::memcpy(&row, from + i * n + j, (n - j) * sizeof(float));
    return row;
  }
};

}  // namespace
}  // namespace swin_moe::cpu
