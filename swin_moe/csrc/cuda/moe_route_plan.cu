// Sums over the routing's counts, in one launch: the first block does those of the queues, the
// others add the parts of the loss sums.
#include "moe_route_queues.cuh"
#include "moe_route_token.cuh"

namespace swin_moe::cuda {
namespace {

constexpr int kPlanWarps = 32, kPlanThreads = kPlanWarps * kWarp;
constexpr int kEach = 4;  // numbers that a thread adds up at once

// The sum over the threads before this one, and over all; for all threads of the block.
__device__ int32_t sum_before(int32_t value, int32_t* shared, int32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) shared[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    if (w == warp) before = total;
    total += shared[w];
  }
  __syncthreads();  // they are read
  return before + sum - value;
}

// Turns n numbers into the sums over those before each, and writes the sum over all after them.
__device__ void scan(int32_t* numbers, int64_t n, int32_t* shared) {
  int32_t before = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kPlanThreads * kEach) {
    const int64_t at = chunk + static_cast<int64_t>(threadIdx.x) * kEach;
    int32_t here[kEach], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      here[i] = at + i < n ? numbers[at + i] : 0;
      sum += here[i];
    }
    int32_t place = before + sum_before(sum, shared, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (at + i < n) numbers[at + i] = place;
      place += here[i];
    }
    before += total;
  }
  if (threadIdx.x == 0) numbers[n] = before;
  __syncthreads();
}

__device__ void plan_queues(const Queues& queues, const RouteOutputs& out) {
  auto* shared = reinterpret_cast<int32_t*>(dynamic_shared_memory());  // [kPlanWarps], then [E]
  int32_t* first = shared + kPlanWarps;
  const RouteShape& shape = queues.shape;
  const int E = static_cast<int>(shape.experts);
  const int64_t cells = queues.cells(), numbers = queues.count();
  for (int e = static_cast<int>(threadIdx.x); e < E; e += kPlanThreads) first[e] = 0;
  scan(queues.counts, numbers * cells, shared);
  for (int64_t queue = threadIdx.x; queue < numbers; queue += kPlanThreads) {
    const int32_t* here = queues.counts + queue * cells;
    const int32_t length = here[cells] - here[0];
    const int32_t limit = static_cast<int32_t>(shape.capacity);
    queues.rows[queue] = limit > 0 && length > limit ? limit : length;
    const int32_t chosen_first = here[queues.placed.per_group] - here[0];
    if (chosen_first > 0) {
      const int e = static_cast<int>(queue) / static_cast<int>(shape.groups);
      atomicAdd(first + e, chosen_first);
    }
  }
  __syncthreads();
  scan(queues.rows, numbers, shared);
  for (int e = static_cast<int>(threadIdx.x); e < E; e += kPlanThreads) {
    const int64_t queue = e * shape.groups, next = queue + shape.groups;
    out.counts[e] = queues.counts[next * cells] - queues.counts[queue * cells];
    out.first[e] = first[e];
    out.used[e] = queues.rows[next] - queues.rows[queue];
  }
}

// A warp does number n, which every block of the scores has a part of.
__device__ void add_parts(int experts, int64_t blocks, const float* parts, int n,
                          const RouteOutputs& out) {
  const int size = 3 * experts + static_cast<int>(kRouteScalars);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (n >= size) return;
  using Lanes = Team<kWarp>;
  const float infinity = __uint_as_float(0x7f800000u);
  float sum = 0.0f, low = infinity, high = -infinity;
  for (int64_t block = lane; block < blocks; block += kWarp) {
    const float value = parts[block * size + n];
    sum += value;
    low = Smaller()(low, value);
    high = Larger()(high, value);
  }
  sum = Lanes::reduce(sum, Add());
  low = Lanes::reduce(low, Smaller());
  high = Lanes::reduce(high, Larger());
  const float result = n == 3 * experts + 2 ? low : n == 3 * experts + 3 ? high : sum;
  if (lane == 0) *(n < 3 * experts ? out.sums + n : out.scalars + (n - 3 * experts)) = result;
}

__global__ void __launch_bounds__(kPlanThreads, 1)
    plan_kernel(Queues queues, int64_t blocks, const float* __restrict__ parts, RouteOutputs out) {
  if (blockIdx.x == 0) {
    plan_queues(queues, out);
  } else {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    add_parts(static_cast<int>(queues.shape.experts), blocks, parts,
              static_cast<int>(blockIdx.x - 1) * kPlanWarps + warp, out);
  }
}

}  // namespace

cudaError_t route_plan(const Queues& queues, int64_t blocks, const float* parts,
                       const RouteOutputs& out, cudaStream_t stream) {
  const int64_t experts = queues.shape.experts, numbers = 3 * experts + kRouteScalars;
  return launch(plan_kernel, 1 + (numbers + kPlanWarps - 1) / kPlanWarps, kPlanThreads,
                (kPlanWarps + experts) * sizeof(int32_t), stream, queues, blocks, parts, out);
}

}  // namespace swin_moe::cuda
