// Shared by the window attention's forward and backward.
//
// Tiling. A warp owns 16 rows of a matrix of scores, and goes along it in strips of 32 columns that
// never leave its registers (16 a thread), as FlashAttention-2 has it: online softmax in forward,
// probabilities recomputed from `lse` in backward. A CTA is up to 8 such warps (4 in fp32) on one
// window and head; together they bring the rows that belong to the columns, 64 at a time, to shared
// memory, by cp.async, 16 bytes each, zeros for padding. So shared memory depends on head_dim and
// the type, hardly on the window (17 to 79 KiB), and windows up to 1024 tokens take the same route.
// A window of up to 128 tokens (64 in fp32) is one CTA and is read once. Blocks are not loaded
// ahead: most windows have one or two, and it is the other CTAs of the SM that compute meanwhile.
//
// The grid runs over heads first: CTAs that run together read neighbouring heads, whose rows of 32
// to 256 bytes share cache lines. One CTA per head rather than a loop over heads, because one stage
// of a backbone has few windows at the small resolutions, and the heads keep the GPU full.
//
// Backward takes two kernels: one owns query rows and makes dQ, one owns key rows and makes dK and
// dV. Both recompute the scores, 7 products instead of 5, and in return nothing is accumulated
// across warps: no atomics, no fp32 dQ in memory. The bias gradient is a sum over windows; a CTA of
// the query kernel goes through a fixed group of windows and adds to a partial of its own, where
// each number belongs to one thread, and a last kernel adds the groups in order. The number of
// groups depends on the shape only, so the bits of a result do, too.
//
// A group's partials are as large as the bias, so windows of many tokens have few groups. There two
// warps of the query kernel share 16 rows, one with the even strips and one with the odd ones, and
// add their sums through shared memory: twice as many warps for the same partials.
//
// Issue slots are what the kernels run out of. The 16-bit kernels have two instances: a plain one
// for windows of whole strips, aligned rows and no dropout, and one for all else. The mask is
// tested once a strip, and added to the bias. Windows and tokens are divided by products.
//
// Products are mma.m16n8k16 for 16-bit types. In fp32 they are plain FMAs, exact, with the operands
// spread over the lanes in the same way, so that the types share all other code. Rows in
// shared memory are 16 bytes longer than head_dim: eight rows then start in different banks.
//
// Numbers. Scores are products of raw q and k; norms, factor, bias and mask are applied to the fp32
// product, and log2(e) on the way to the exponential, which flushes denormals. Backward multiplies
// the rows by a power of two that brings the norm into [1, 2): exact, and gradients stay within
// fp16 on their way through the tensor cores, zero rows included.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "dropout.cuh"
#include "window_attention_device.cuh"
#include "../types.h"

namespace swin_moe::cuda {

constexpr int kWarp = 32;
constexpr int kRows = 16;   // of scores, owned by a warp
constexpr int kStrip = 32;  // columns of scores in registers
constexpr int kBlock = 64;  // columns whose rows are in shared memory
constexpr int kTiles = kStrip / 8;
constexpr int kVectorBytes = 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr unsigned kAllLanes = ~0u;

// Limits so that the tiles fit the 99 KiB of shared memory that every GPU since sm_80 has.
template <typename T>
constexpr int kMaxWarps = sizeof(T) == 4 ? 4 : 8;

// A strip of scores, or of anything of that shape. Thread (g, t) = (lane / 4, lane % 4) of the warp
// holds of each 16x8 tile the numbers (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
using Strip = float[kTiles][4];

// Where a token of the window is: its position in the image, or -1 if it is padding, and the region
// of the mask, -1 for padding.
struct alignas(8) Place {
  int position;
  int region;
};

// Numbers of a column of scores. Forward and the query kernel need the weight only.
struct alignas(16) Column {
  float weight;     // factor of the product
  float lse;        // +inf where no query is: its probabilities are 0
  float delta;      // <grad_out, out>
  uint32_t random;  // of its row of probabilities
};

// Division by a fixed number, as a product (Granlund and Montgomery 1994): exact for 0 <= a < 2^31.
struct Divisor {
  uint32_t factor;
  int shift;
  __host__ __device__ int quotient(int a) const {
    return static_cast<int>(
        static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(a)) * factor >> 31) >>
        shift);
  }
};

inline Divisor make_divisor(int64_t number) {
  int shift = 0;
  while ((int64_t{1} << shift) < number) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + number - 1) / number), shift};
}

// One attention, as the kernels want it.
struct Problem {
  int height, width, heads;
  int window_h, window_w, shift_h, shift_w;
  int rows, columns, tokens;
  int windows;
  int warps;    // of a CTA
  int split;    // warps that share a tile of rows and take its strips in turn: 1 or 2
  int tiles;    // of rows, of a CTA
  int blocks;   // CTAs that share the rows of one window and head
  int places;   // tokens, rounded up to whole blocks and CTAs
  bool cosine;
  bool aligned;    // rows may be loaded and stored as vectors
  bool even_bias;  // pairs of a row of the bias, too
  bool plain;      // and there are whole strips only, and no dropout
  Divisor by_heads, by_blocks, by_rows, by_columns, by_window_w;
  Dropout dropout;
};

// The work of a CTA.
struct Task {
  int window;  // or the group of windows
  int block;
  int head;
};

// One head's rows of a tensor of one image; the position of a token counts them.
template <typename T>
struct Matrix {
  T* first;
  int64_t stride;
  __device__ T* row(int position) const { return first + position * stride; }
};

// ---- windows -----------------------------------------------------------------------------------

__device__ __forceinline__ Task task_of(const Problem& p, int index) {
  const int rest = p.by_heads.quotient(index), window = p.by_blocks.quotient(rest);
  return {window, rest - window * p.blocks, index - rest * p.heads};
}

__device__ __forceinline__ int region_of(int shifted, int padded, int window, int shift) {
  return shift == 0 ? 0 : (shifted >= padded - window) + (shifted >= padded - shift);
}

__device__ __forceinline__ Place place_of(const Problem& p, int window, int token) {
  const int padded_h = p.rows * p.window_h, padded_w = p.columns * p.window_w;
  const int above = p.by_columns.quotient(window), down = p.by_window_w.quotient(token);
  const int row = (above - p.by_rows.quotient(above) * p.rows) * p.window_h + down;
  const int column =
      (window - above * p.columns) * p.window_w + token - down * p.window_w;
  int y = row + p.shift_h, x = column + p.shift_w;
  if (y >= padded_h) y -= padded_h;
  if (x >= padded_w) x -= padded_w;
  if (token >= p.tokens || y >= p.height || x >= p.width) return {-1, -1};
  return {y * p.width + x, region_of(row, padded_h, p.window_h, p.shift_h) * 3 +
                               region_of(column, padded_w, p.window_w, p.shift_w)};
}

// Fills the table of a window's places; returns whether a logit is masked. A barrier.
__device__ __forceinline__ bool list_places(const Problem& p, int window, Place* places) {
  const int region = place_of(p, window, 0).region;
  int masked = 0;
  for (int t = threadIdx.x; t < p.places; t += blockDim.x) {
    places[t] = place_of(p, window, t);
    masked |= t < p.tokens && (places[t].region < 0 || places[t].region != region);
  }
  return __syncthreads_or(masked) != 0;
}

// The factor of products. A NaN stays one.
__device__ __forceinline__ float factor_of(const Problem& p, float scale) {
  if (!p.cosine) return scale;
  return expf(scale > kMaxLogScale ? kMaxLogScale : scale);
}

// The mask's addend to a logit.
__device__ __forceinline__ float mask_of(int query_region, int key_region) {
  if (key_region < 0) return -INFINITY;
  return query_region == key_region ? 0.0f : kMaskValue;
}

// Part 0, 1, 2 of qkv is q, k, v; `parts` is 1 for the heads' outputs.
template <typename T>
__device__ __forceinline__ Matrix<T> matrix_of(const Problem& p, T* tensor, int window, int head,
                                               int head_dim, int part, int parts) {
  const int64_t image = p.by_rows.quotient(p.by_columns.quotient(window));
  const int64_t width = static_cast<int64_t>(p.heads) * head_dim;
  const int64_t first = image * p.height * p.width * parts * width + part * width;
  return {tensor + first + static_cast<int64_t>(head) * head_dim, parts * width};
}

// ---- launching ---------------------------------------------------------------------------------

constexpr int64_t kMaxTokens = 1024;
constexpr int64_t kMaxGrid = 2147483647;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(std::initializer_list<const void*> tensors) {
  bool aligned = true;
  for (const void* tensor : tensors) {
    aligned &= reinterpret_cast<uintptr_t>(tensor) % kVectorBytes == 0;
  }
  return aligned;
}

// The tiles of a window are spread evenly over the fewest CTAs, each with `max_tiles` or fewer.
inline Problem make_problem(const WindowShape& shape, const WindowOptions& options, int max_tiles,
                            int split, const float* bias,
                            std::initializer_list<const void*> tensors) {
  Problem p;
  p.height = static_cast<int>(shape.height);
  p.width = static_cast<int>(shape.width);
  p.heads = static_cast<int>(shape.heads);
  p.window_h = static_cast<int>(shape.window_h);
  p.window_w = static_cast<int>(shape.window_w);
  p.shift_h = static_cast<int>(shape.shift_h);
  p.shift_w = static_cast<int>(shape.shift_w);
  p.rows = static_cast<int>(shape.rows());
  p.columns = static_cast<int>(shape.columns());
  p.tokens = static_cast<int>(shape.tokens());
  p.windows = static_cast<int>(shape.windows());
  const int64_t tiles = ceil_div(shape.tokens(), kRows);
  p.blocks = static_cast<int>(ceil_div(tiles, max_tiles));
  p.tiles = static_cast<int>(ceil_div(tiles, p.blocks));
  p.split = split;
  p.warps = p.tiles * split;
  const int64_t whole = ceil_div(shape.tokens(), kBlock) * kBlock;
  const int64_t owned = static_cast<int64_t>(p.blocks) * p.tiles * kRows;
  p.places = static_cast<int>(whole > owned ? whole : owned);
  p.cosine = options.cosine;
  p.aligned = is_aligned(tensors);
  p.even_bias = is_aligned({bias}) && shape.tokens() % 2 == 0;
  p.dropout = make_dropout(options.dropout);
  p.plain = p.aligned && p.even_bias && shape.tokens() % kStrip == 0 && !p.dropout.on;
  p.by_heads = make_divisor(shape.heads);
  p.by_blocks = make_divisor(p.blocks);
  p.by_rows = make_divisor(shape.rows());
  p.by_columns = make_divisor(shape.columns());
  p.by_window_w = make_divisor(shape.window_w);
  return p;
}

// Calls `launch` with a constant: whether the plain instance of a kernel is to run. Only 16-bit
// types have one; in fp32 the products take most of the time.
template <typename T, typename Launch>
cudaError_t launch_plain_or_not(const Problem& p, const Launch& launch) {
  if constexpr (sizeof(T) == 2) {
    if (p.plain) return launch(std::true_type());
  }
  return launch(std::false_type());
}

template <typename T, typename Launch>
cudaError_t launch_for_head_dim(int64_t head_dim, const Launch& launch) {
  switch (head_dim) {
    case 16:
      return launch(T(), std::integral_constant<int, 16>());
    case 32:
      return launch(T(), std::integral_constant<int, 32>());
    case 48:
      return launch(T(), std::integral_constant<int, 48>());
    case 64:
      return launch(T(), std::integral_constant<int, 64>());
  }
  return cudaErrorInvalidValue;
}

// Calls `launch` with a number of the type and the head_dim as a constant.
template <typename Launch>
cudaError_t launch_for(DType dtype, int64_t head_dim, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_for_head_dim<float>(head_dim, launch);
    case DType::kFloat16:
      return launch_for_head_dim<__half>(head_dim, launch);
    case DType::kBFloat16:
      return launch_for_head_dim<__nv_bfloat16>(head_dim, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace swin_moe::cuda
