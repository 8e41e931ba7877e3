// Partial sums of the backward of the window attention: one for each group of windows, so that the
// query kernel needs no atomics, and the kernels that add them in order.
#pragma once

#include "window_attention_common.cuh"

namespace swin_moe::cuda {
namespace {

constexpr int kReduceThreads = 256;
// As many CTAs of the query kernel as there is work for on the largest GPUs, and partials of the
// bias gradient that stay in their L2 caches. They may be twice as large where too few CTAs would
// run otherwise.
constexpr int64_t kQueryCtas = 1024;
constexpr int64_t kPartialBytes = 16 << 20;
constexpr int64_t kFewCtas = 256;  // an H100 runs 264 at a time

// Tensors from one kernel to the next.
struct Partials {
  float* bias;   // [groups, heads, tiles, strips, kTiles, kWarp, 4]: as the threads hold it
  float* delta;  // [windows, heads, N]
  float* scale;  // [heads, groups, blocks of the query kernel]
  int groups;
  int group;  // windows of a group
  int tiles;  // of kRows queries
  int strips;
  __host__ __device__ int64_t bias_size() const {  // of one group and head
    return static_cast<int64_t>(tiles) * strips * kRows * kStrip;
  }
};

__global__ void reduce_bias_kernel(Problem p, Partials partials, float* __restrict__ grad_bias) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t matrix = static_cast<int64_t>(p.tokens) * p.tokens;
  if (index >= p.heads * matrix) return;
  const int head = static_cast<int>(index / matrix), at = static_cast<int>(index % matrix);
  const int i = at / p.tokens, j = at % p.tokens;
  // Where the query kernel's thread has put it.
  const int strip = i / kRows * partials.strips + j / kStrip;
  const int lane = i % 8 * 4 + j % 8 / 2, number = i % kRows / 8 * 2 + j % 2;
  const int64_t place =
      ((static_cast<int64_t>(strip) * kTiles + j % kStrip / 8) * kWarp + lane) * 4 + number;
  const float* partial = partials.bias + head * partials.bias_size() + place;
  float sum = 0.0f;
#pragma unroll 8
  for (int g = 0; g < partials.groups; ++g) sum += partial[g * p.heads * partials.bias_size()];
  grad_bias[index] = sum;
}

// One warp per head.
__global__ void reduce_scale_kernel(Problem p, Partials partials, const float* __restrict__ scale,
                                    float* __restrict__ grad_scale) {
  const int count = partials.groups * p.blocks, head = blockIdx.x;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += kWarp) {
    sum += partials.scale[static_cast<int64_t>(head) * count + i];
  }
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  const bool free = !p.cosine || scale[head] < kMaxLogScale;  // a clamp passes nothing to a NaN
  if (threadIdx.x == 0) grad_scale[head] = free ? sum : 0.0f;
}

// The query kernel's warps of a CTA on a window of many strips: two share a tile of rows, one takes
// the even strips and one the odd ones. So there are twice as many warps to the same partials.
constexpr int64_t kSplitTokens = 128;  // beyond it

inline int query_split(const WindowShape& shape) { return shape.tokens() > kSplitTokens ? 2 : 1; }

// Sizes of the partials, a function of the shape alone, and where in the workspace they are.
Partials make_partials(const WindowShape& shape, void* workspace, int64_t* bytes) {
  Partials partials;
  partials.tiles = static_cast<int>(ceil_div(shape.tokens(), kRows));
  partials.strips = static_cast<int>(ceil_div(shape.tokens(), kStrip));
  const int64_t windows = shape.windows() > 0 ? shape.windows() : 1;
  const int64_t heads = shape.heads > 0 ? shape.heads : 1;
  const int64_t one = heads * partials.bias_size() * static_cast<int64_t>(sizeof(float));
  const int split = query_split(shape);
  const int64_t ctas = heads * ceil_div(partials.tiles, kMaxWarps<__half> / split);  // of a window
  int64_t groups = ceil_div(kQueryCtas, ctas);
  const int64_t few = ceil_div(kFewCtas, ctas), most = 2 * kPartialBytes / one;
  const int64_t room = kPartialBytes / one;
  const int64_t limit = room >= few ? room : (few < most ? few : most);
  if (groups > limit) groups = limit;
  if (groups > windows) groups = windows;
  partials.group = static_cast<int>(ceil_div(windows, groups > 0 ? groups : 1));
  partials.groups = static_cast<int>(ceil_div(windows, partials.group));
  partials.bias = static_cast<float*>(workspace);
  const int64_t bias = partials.groups * heads * partials.bias_size();
  const int64_t delta = windows * heads * shape.tokens();
  const int64_t blocks = ceil_div(partials.tiles, kMaxWarps<float> / split);
  *bytes = (bias + delta + heads * partials.groups * blocks) * static_cast<int64_t>(sizeof(float));
  if (workspace != nullptr) {
    partials.delta = partials.bias + bias;
    partials.scale = partials.delta + delta;
  }
  return partials;
}

cudaError_t reduce(const Problem& p, const Partials& partials, const float* scale,
                   float* grad_bias, float* grad_scale, cudaStream_t stream) {
  const int64_t numbers = static_cast<int64_t>(p.heads) * p.tokens * p.tokens;
  const cudaError_t error = launch(reduce_bias_kernel, ceil_div(numbers, kReduceThreads),
                                   kReduceThreads, 0, stream, p, partials, grad_bias);
  if (error != cudaSuccess) return error;
  return launch(reduce_scale_kernel, p.heads, kWarp, 0, stream, p, partials, scale, grad_scale);
}

}  // namespace
}  // namespace swin_moe::cuda
