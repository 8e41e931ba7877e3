// The parts of which forward and backward are made: tiles, packing, logarithms, masks.
#pragma once

#include "../types.h"
#include "simd_math.h"

namespace swin_moe::cpu {

// Scratch of the calling thread, at least this large, aligned to 64 bytes and kept between calls:
// memory that is touched for the first time costs more than the work done in it.
char* thread_scratch(int64_t bytes);

namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// With exponents known to stay within this, no largest one has to be found.
constexpr float kSafeRange = 80.0f;

SWIN_MOE_INLINE int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// The factor of scores, from the parameter of a head.
SWIN_MOE_INLINE float score_factor(float scale, bool cosine) {
  return cosine ? __builtin_expf(scale > kMaxLogScale ? kMaxLogScale : scale) : scale;
}

// Hands out consecutive pieces of scratch; without a base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename V>
  V* take(int64_t count) {
    V* piece = reinterpret_cast<V*>(base + used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(V)), 64);
    return base == nullptr ? nullptr : piece;
  }
};

// Where the tokens of a window lie in the map, and which region of the image each belongs to.
struct Tokens {
  int64_t* index;   // [N], or -1 for padding
  int32_t* region;  // [lanes], -1 for padding
  bool masked;      // several regions, or padding
};

SWIN_MOE_INLINE int32_t axis_region(int64_t shifted, int64_t padded, int64_t window,
                                    int64_t shift) {
  if (shift == 0) return 0;
  return (shifted >= padded - window) + (shifted >= padded - shift);
}

// `window` counts images, then rows, then columns of windows.
inline void locate(const WindowShape& s, int64_t window, Tokens& tokens) {
  const int64_t padded_h = s.rows() * s.window_h, padded_w = s.columns() * s.window_w;
  const int64_t image = window / (s.rows() * s.columns());
  const int64_t y0 = window / s.columns() % s.rows() * s.window_h;
  const int64_t x0 = window % s.columns() * s.window_w;
  const bool on_border = (s.shift_h && y0 + s.window_h == padded_h) ||
                         (s.shift_w && x0 + s.window_w == padded_w);
  bool padding = false;
  for (int64_t ty = 0, t = 0; ty < s.window_h; ++ty) {
    int64_t y = y0 + ty + s.shift_h;
    if (y >= padded_h) y -= padded_h;
    const int32_t row_region = 3 * axis_region(y0 + ty, padded_h, s.window_h, s.shift_h);
    for (int64_t tx = 0; tx < s.window_w; ++tx, ++t) {
      int64_t x = x0 + tx + s.shift_w;
      if (x >= padded_w) x -= padded_w;
      const bool inside = y < s.height && x < s.width;
      padding |= !inside;
      tokens.index[t] = inside ? (image * s.height + y) * s.width + x : -1;
      tokens.region[t] =
          inside ? row_region + axis_region(x0 + tx, padded_w, s.window_w, s.shift_w) : -1;
    }
  }
  tokens.masked = on_border || padding;
}

// Asks for the rows of the next window, a few tokens at a time between tiles of work: a window
// touches a few lines of each token, which no hardware prefetcher foresees, and all at once they
// would block the loads of the work itself.
struct Prefetch {
  struct Source {
    const char* row;  // of token 0
    int64_t step;     // to the next token's
    int64_t bytes;    // of a row
  };
  Source sources[5];
  int count = 0;
  Tokens tokens{};
  int64_t next = 0, end = 0, chunk = 0;

  void add(const void* map, int64_t offset, int64_t step, int64_t bytes) {
    sources[count++] = {static_cast<const char*>(map) + offset, step, bytes};
  }
  // `steps` calls of step() will follow.
  void begin(int64_t total, int64_t steps) {
    next = 0;
    end = total;
    chunk = (total + steps - 1) / steps;
  }
  SWIN_MOE_INLINE void step() {
    const int64_t until = next + chunk < end ? next + chunk : end;
    for (; next < until; ++next) {
      if (tokens.index[next] < 0) continue;
      for (int s = 0; s < count; ++s) {
        const char* row = sources[s].row + tokens.index[next] * sources[s].step;
        for (int64_t at = 0; at < sources[s].bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
      }
    }
  }
};

// Sizes of the scratch for one window; `D` elements of `T` to a row.
template <class Isa, class T, int D>
struct Layout {
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kVectors = Isa::kRegisters / 8;  // of lanes in a full block
  static constexpr int kBlock = kVectors * kLanes;
  static constexpr int kWords = D / kPair<T>;                                   // of a row
  static constexpr int kStride = (kWords + kLanes - 1) / kLanes * kLanes;       // between rows
  static constexpr int kRowStep = Isa::kTiles ? 16 : 8;  // rows are padded to a multiple of it
  // Words of a transposed row. Matrices are multiplied by whole tiles of 16 words, which ends in
  // zeros fill; so are rows and lanes where they are summed over, 32 elements at a time.
  static constexpr int kDepth = Isa::kTiles ? kStride : kWords;

  explicit Layout(const WindowShape& shape)
      : tokens(shape.tokens()),
        lanes(round_up(tokens, kLanes)),
        rows(round_up(tokens, kRowStep)),
        padded(Isa::kTiles ? round_up(tokens, 32) : lanes > rows ? lanes : rows) {}

  int64_t tokens;  // N
  int64_t lanes;   // N padded to whole vectors
  int64_t rows;    // N padded to whole tiles of rows
  int64_t padded;  // the larger one, at least

  // Rows and lanes as they are summed over.
  int64_t row_depth() const { return Isa::kTiles ? padded : rows; }
  int64_t lane_depth() const { return Isa::kTiles ? padded : lanes; }

  // Tiles of scores in a window, at least.
  int64_t tiles() const { return rows / kRowStep * ((lanes + kBlock - 1) / kBlock); }

  // A matrix [rows][lanes] is kept by blocks of lanes; this is where one starts.
  int64_t block(int64_t lane, int64_t rows_of_matrix) const { return lane * rows_of_matrix; }
  int64_t block_width(int64_t lane) const {
    return lanes - lane < kBlock ? lanes - lane : kBlock;
  }
  // Lane `lane` in row 0 of such a matrix of `rows` rows.
  float* column(float* matrix, int64_t lane) const {
    const int64_t first = lane / kBlock * kBlock;
    return matrix + block(first, rows) + lane - first;
  }
  int64_t block_width_of(int64_t lane) const { return block_width(lane / kBlock * kBlock); }
};

// acc[r][n] = words of row r, broadcast, times vectors of words: b is [kWords][width].
template <class Isa, class T, int kWords, int MR, int NV>
SWIN_MOE_INLINE void score_tile(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                int64_t width, typename Isa::Float (&acc)[MR][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[r][n] = typename Isa::Float{};
  }
#pragma GCC unroll 2
  for (int w = 0; w < kWords; ++w) {
    typename Isa::Word column[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) column[n] = Isa::load(b + w * width + n * Isa::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const auto value = Isa::set(a[r * a_stride + w]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        acc[r][n] = Isa::template dot<T, Isa>(acc[r][n], value, column[n]);
      }
    }
  }
}

// The same where the processor multiplies matrices: it does so a strip of rows ahead, into memory,
// and the next strip's products are under way while this one's scores are used. Called for every
// MR rows in their order.
template <class Isa, class L>
struct Strips {
  static constexpr int64_t kRows = 16;

  const uint32_t* rows;   // [rows][kStride]
  const uint32_t* lanes;  // [kDepth][width]
  float* scores;          // [2][kRows][width]
  int64_t begin, end;     // of the rows

  template <int MR, int NV>
  SWIN_MOE_INLINE void tile(int64_t j, typename Isa::Float (&acc)[MR][NV]) const {
    constexpr int64_t kWidth = NV * Isa::kLanes;
    if (j == begin) multiply(j, kWidth);
    if (j % kRows == 0 && j + kRows < end) multiply(j + kRows, kWidth);
    const float* from = scores + j % (2 * kRows) * kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[r][n] = Isa::load(from + r * kWidth + n * Isa::kLanes);
    }
  }

 private:
  void multiply(int64_t j, int64_t width) const {
    Isa::multiply({rows + j * L::kStride, L::kStride, lanes, width, L::kDepth,
                   scores + j % (2 * kRows) * width, width, /*add=*/false},
                  kRows, width);
  }
};

// Rows of a product that a register tile of D columns holds.
template <class Isa, int D>
constexpr int kProductRows = [] {
  const int budget = Isa::kRegisters / 2, vectors = D / Isa::kLanes;
  int rows = 1;
  while (rows < 8 && 2 * rows * vectors <= budget) rows *= 2;
  return rows;
}();

// c[r][d] (+)= sum over `words` of a[r * row_step + w * word_step] times b[w][d], fp32.
template <class Isa, class T, int D, class Finish>
SWIN_MOE_INLINE void product_tile(const uint32_t* a, int64_t row_step, int64_t word_step,
                                  const uint32_t* b, int64_t words, const float* start,
                                  const Finish& finish) {
  constexpr int R = kProductRows<Isa, D>, V = D / Isa::kLanes;
  typename Isa::Float acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      acc[r][v] = start == nullptr ? typename Isa::Float{}
                                   : Isa::load(start + r * D + v * Isa::kLanes);
    }
  }
  for (int64_t w = 0; w < words; ++w) {
    typename Isa::Word column[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) column[v] = Isa::load(b + w * D + v * Isa::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto value = Isa::set(a[r * row_step + w * word_step]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        acc[r][v] = Isa::template dot<T, Isa>(acc[r][v], value, column[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) finish(r, acc[r]);
}

// log2 of a positive normal number, to 1e-7: the exponent, and of the rest m in [0.7, 1.4] twice the
// area tangent of (m - 1) / (m + 1). NaN gives NaN.
template <class Isa>
SWIN_MOE_INLINE typename Isa::Float log2(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const auto bits = Isa::as_word(x) - 0x3f3504f3u;  // of 0.707
  const auto exponent = __builtin_convertvector((typename Isa::Int)bits >> 23, Float);
  const Float m = Isa::as_float((bits & 0x007fffffu) + 0x3f3504f3u);
  const Float t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  Float p = Isa::fma(t2, Isa::set(0.412198583f), Isa::set(0.577078016f));
  p = Isa::fma(p, t2, Isa::set(0.961796694f));
  p = Isa::fma(p, t2, Isa::set(2.88539008f));
  return x == x ? Isa::fma(p, t, exponent) : x;
}

// The mask's addend to the score of a key of region `key` and queries of the lanes' regions.
template <class Isa>
SWIN_MOE_INLINE typename Isa::Float penalty(int32_t key, const int32_t* queries) {
  typename Isa::Int region;
  std::memcpy(&region, queries, sizeof(region));
  const auto inside = Isa::set(key < 0 ? -__builtin_inff() : 0.0f);
  const auto across = Isa::set(key < 0 ? -__builtin_inff() : kMaskValue * kLog2E);
  return region == key ? inside : across;
}

}  // namespace
}  // namespace swin_moe::cpu
