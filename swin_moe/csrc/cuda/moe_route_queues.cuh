// The second half of the routing: queues and row maps from keys and choices.
//
// Assignments are counted by tile of a group, choice, group and expert. The sum over the counts
// before one of them, in the order (expert, group, choice, tile), is the place of its first
// assignment among all.
#pragma once

#include "device.cuh"
#include "moe_route.h"

namespace swin_moe::cuda {

constexpr int kQueueThreads = 256, kQueueWarps = kQueueThreads / 32;
constexpr int kPlaceRounds = 4, kSortRounds = 16;  // items of a thread
constexpr int kDigitBits = 10, kDigits = 1 << kDigitBits, kPasses = 3;
// Scores are from 0 to 1, so keys from kRouteLastKey - 0x3f800000 on: less this they have 30 bits.
constexpr uint32_t kFirstKey = 0x40000000u;

// Tokens of a group in equal tiles, of which the last may have fewer.
struct Tiling {
  int group_tokens;
  int rounds;
  int per_group;

  Tiling(const RouteShape& shape, int most_rounds)
      : group_tokens(static_cast<int>(shape.group_tokens())),
        rounds((group_tokens + kQueueThreads - 1) / kQueueThreads),
        per_group(0) {
    if (rounds > most_rounds) rounds = most_rounds;
    if (rounds > 0) per_group = (group_tokens + size() - 1) / size();
  }

  __host__ __device__ int size() const { return rounds * kQueueThreads; }
};

// Tokens of each group in the order of the last pass, with their keys.
struct Items {
  uint32_t* keys;
  int32_t* tokens;  // null: by index
};

// What the kernels of the queues work with.
struct Queues {
  RouteShape shape;
  Tiling sorted;    // of a pass of the sort
  Tiling placed;    // of what is counted
  int32_t* counts;  // [E, G, k, tiles of a group] and their sum; then the sum over those before
  int32_t* rows;    // [E, G] and their sum: rows of the queues before, without padding
  int32_t* digits;  // [passes, G, tiles of a group, kDigits]; none if a group is one tile
  Items items[2];   // [T], for the sort; the first has no keys of its own

  __host__ __device__ int64_t count() const { return shape.groups * shape.experts; }
  __host__ __device__ int64_t cells() const {  // of one queue
    return shape.top_k * placed.per_group;
  }
  __host__ __device__ bool alone() const { return sorted.per_group <= 1; }  // a tile is a group
};

// The digit of a key. Keys of tokens that are not finite may go anywhere: they are in no queue.
__device__ inline int digit_of(uint32_t key, int pass) {
  return static_cast<int>((key - kFirstKey) >> (pass * kDigitBits)) & (kDigits - 1);
}

// Counts choice j at `position` of the order.
__device__ inline void count_choice(const Queues& queues, int position, int64_t j, int64_t expert) {
  const int group = position / queues.placed.group_tokens;
  const int tile = (position - group * queues.placed.group_tokens) / queues.placed.size();
  const int64_t queue = expert * queues.shape.groups + group;
  atomicAdd(queues.counts + (queue * queues.shape.top_k + j) * queues.placed.per_group + tile, 1);
}

// Counts an item that lies at `position` in a pass of the sort.
__device__ inline void count_digit(const Queues& queues, int pass, int position, uint32_t key) {
  const Tiling& tiling = queues.sorted;
  const int group = position / tiling.group_tokens;
  const int within = position - group * tiling.group_tokens;
  const int tile = group * tiling.per_group + within / tiling.size();
  const int64_t tiles = queues.shape.groups * tiling.per_group;
  atomicAdd(queues.digits + (pass * tiles + tile) * kDigits + digit_of(key, pass), 1);
}

// The queues with their memory, of which `workspace` is the start.
Queues route_queues(const RouteShape& shape, void* workspace);

// Bytes of that memory.
int64_t route_queues_workspace(const RouteShape& shape);

// Sets the counts to 0.
cudaError_t route_clear(const Queues& queues, bool prioritized, cudaStream_t stream);

// Turns counts into places, and writes the experts' numbers. Adds up the parts [blocks, 3 E +
// kRouteScalars] of the sums and scalars.
cudaError_t route_plan(const Queues& queues, int64_t blocks, const float* parts,
                       const RouteOutputs& out, cudaStream_t stream);

// Sorts tokens by their keys [T], which are overwritten, and counts their choices. Returns them.
cudaError_t route_sort(const Queues& queues, uint32_t* keys, const int64_t* expert, Items& sorted,
                       cudaStream_t stream);

// Fills slots and row maps, after the plan.
cudaError_t route_place(const Queues& queues, const Items& items, const RouteOutputs& out,
                        cudaStream_t stream);

}  // namespace swin_moe::cuda
