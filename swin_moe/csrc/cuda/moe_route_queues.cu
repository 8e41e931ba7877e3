// Queues by stable counting: a radix sort of the tokens of each group by their keys, eight bits at
// a time, then one more pass of the same kind in which the digit is the expert.
//
// A pass has a block per tile. The counts of each digit in each tile are known before it: the block
// that writes an item for the next pass counts it at the tile where it lands. So a pass is one
// launch: a block adds up the digits of the tiles before its own, and ranks its items by warp.
#include "moe_route_queues.h"

#include <utility>

#include "device.cuh"

namespace swin_moe::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kRounds = 4;  // items of a thread
constexpr int kTile = kThreads * kRounds;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits, kPasses = 4;
static_assert(kDigits == kThreads, "a thread adds up one digit");
constexpr unsigned kNothing = ~0u;  // the digit of no item

// Tokens of each group in the order of the last pass, with their keys.
struct Items {
  uint32_t* keys;
  int32_t* tokens;  // null: by index
};

// Where a tile lies. Tiles do not reach across groups.
struct Tile {
  int64_t group;
  int64_t first_tile;  // of the group
  int64_t begin;
  int64_t end;
};

struct Tiling {
  int64_t group_tokens;
  int64_t per_group;

  __device__ Tile at(int64_t tile) const {
    const int64_t group = tile / per_group, start = group * group_tokens;
    const int64_t begin = start + tile % per_group * kTile, limit = start + group_tokens;
    return {group, group * per_group, begin, begin + kTile < limit ? begin + kTile : limit};
  }
  __device__ int64_t of(int64_t position) const {
    const int64_t group = position / group_tokens;
    return group * per_group + (position - group * group_tokens) / kTile;
  }
};

struct Counts {
  int32_t* digits;  // [kPasses, tiles, kDigits]
  int32_t* queues;  // [tiles, k, E]
};

struct Routing {
  RouteShape shape;
  Tiling tiling;
  Counts counts;
  const int64_t* expert;

  __device__ int64_t tiles() const { return shape.groups * tiling.per_group; }
  __device__ int32_t* digits(int pass) const {
    return counts.digits + pass * tiles() * kDigits;
  }
};

__device__ int digit_of(uint32_t key, int pass) {
  return static_cast<int>(key >> (pass * kDigitBits)) & (kDigits - 1);
}

// Counts an item that lies at `position` in the next pass.
__device__ void count(const Routing& routing, int pass, int64_t position, uint32_t key,
                      int64_t token) {
  const int64_t tile = routing.tiling.of(position);
  if (pass < kPasses) {
    atomicAdd(routing.digits(pass) + tile * kDigits + digit_of(key, pass), 1);
  } else if (key != kRouteNoKey) {
    const int64_t k = routing.shape.top_k, E = routing.shape.experts;
    for (int64_t j = 0; j < k; ++j) {
      atomicAdd(routing.counts.queues + (tile * k + j) * E + routing.expert[token * k + j], 1);
    }
  }
}

__global__ void count_kernel(Routing routing, int pass, const uint32_t* __restrict__ keys) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < routing.shape.tokens) count(routing, pass, t, keys[t], t);
}

// The position that item `round` of this thread has in its tile: warps lie side by side.
__device__ int64_t position_of(const Tile& tile, int round) {
  const int64_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return tile.begin + (warp * kRounds + round) * kWarp + lane;
}

// For each item of this thread, how many of its warp's with the same digit come before; `counters`
// [kWarps, values] then holds how many of each digit the warps before have.
__device__ void rank(const unsigned (&digit)[kRounds], int values, int32_t* counters,
                     int32_t (&before)[kRounds]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  int32_t* mine = counters + thread / kWarp * values;
  for (int n = thread; n < kWarps * values; n += kThreads) counters[n] = 0;
  __syncthreads();
  for (int round = 0; round < kRounds; ++round) {
    const unsigned d = digit[round];
    const unsigned peers = __match_any_sync(~0u, d);
    const int earlier = __popc(peers & ((1u << lane) - 1u));
    const int32_t start = d == kNothing ? 0 : mine[d];
    before[round] = start + earlier;
    __syncwarp();
    if (d != kNothing && earlier == 0) mine[d] = start + __popc(peers);
    __syncwarp();
  }
  __syncthreads();
  for (int value = thread; value < values; value += kThreads) {
    int32_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int32_t here = counters[warp * values + value];
      counters[warp * values + value] = sum;
      sum += here;
    }
  }
  __syncthreads();
}

// The sum over the threads before this one.
__device__ int32_t sum_before(int32_t value, int32_t* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t sum = value;
  for (int step = 1; step < kThreads; step *= 2) {
    shared[thread] = sum;
    __syncthreads();
    if (thread >= step) sum += shared[thread - step];
    __syncthreads();
  }
  return sum - value;
}

// Sorts the tiles of `from`, by one digit of their keys, to where they belong in `to`.
__global__ void sort_kernel(Routing routing, int pass, Items from, Items to) {
  auto* counters = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const Tile tile = routing.tiling.at(blockIdx.x);
  uint32_t key[kRounds];
  unsigned digit[kRounds];
  int32_t before[kRounds];
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = position_of(tile, round);
    key[round] = at < tile.end ? from.keys[at] : 0u;
    digit[round] = at < tile.end ? static_cast<unsigned>(digit_of(key[round], pass)) : kNothing;
  }
  rank(digit, kDigits, counters, before);

  const int32_t* counts = routing.digits(pass) + threadIdx.x;  // of this thread's digit
  int32_t earlier = 0, all = 0;
  for (int64_t n = tile.first_tile; n < tile.first_tile + routing.tiling.per_group; ++n) {
    const int32_t here = counts[n * kDigits];
    if (n < static_cast<int64_t>(blockIdx.x)) earlier += here;
    all += here;
  }
  const int32_t start = sum_before(all, counters + kWarps * kDigits) + earlier;
  for (int warp = 0; warp < kWarps; ++warp) counters[warp * kDigits + threadIdx.x] += start;
  __syncthreads();
  const int32_t* mine = counters + threadIdx.x / kWarp * kDigits;
  for (int round = 0; round < kRounds; ++round) {
    if (digit[round] == kNothing) continue;
    const int64_t at = position_of(tile, round);
    const int64_t place =
        tile.group * routing.tiling.group_tokens + mine[digit[round]] + before[round];
    const int32_t token = from.tokens == nullptr ? static_cast<int32_t>(at) : from.tokens[at];
    to.keys[place] = key[round];
    to.tokens[place] = token;
    count(routing, pass + 1, place, key[round], token);
  }
}

// One block for all queues: turns counts into places within queues, and writes the experts' numbers
// and the first row of each queue. `lengths` is [2, G, E]: first choices go there.
__global__ void plan_kernel(Routing routing, int32_t* __restrict__ lengths,
                            int32_t* __restrict__ first_row, int64_t* __restrict__ counts,
                            int64_t* __restrict__ first, int64_t* __restrict__ used) {
  auto* start = reinterpret_cast<int32_t*>(dynamic_shared_memory());  // [E]
  const RouteShape& shape = routing.shape;
  const int64_t E = shape.experts, k = shape.top_k, queues = shape.groups * E;
  for (int64_t queue = threadIdx.x; queue < queues; queue += kThreads) {
    const int64_t tile = queue / E * routing.tiling.per_group;
    int32_t sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t n = tile; n < tile + routing.tiling.per_group; ++n) {
        int32_t& place = routing.counts.queues[(n * k + j) * E + queue % E];
        const int32_t here = place;
        place = sum;
        sum += here;
      }
      if (j == 0) lengths[queues + queue] = sum;
    }
    lengths[queue] = sum;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < E; e += kThreads) {
    int64_t wanted = 0, first_choices = 0;
    int32_t row = 0;
    for (int64_t queue = e; queue < queues; queue += E) {
      const int32_t length = lengths[queue];
      wanted += length;
      first_choices += lengths[queues + queue];
      first_row[queue] = row;
      row += shape.capacity > 0 && length > shape.capacity ? static_cast<int32_t>(shape.capacity)
                                                           : length;
    }
    counts[e] = wanted;
    first[e] = first_choices;
    used[e] = row;
    start[e] = row;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t row = 0;
    for (int64_t e = 0; e < E; ++e) {
      const int32_t rows = start[e];
      start[e] = row;
      row += shape.padded ? static_cast<int32_t>(shape.groups * shape.capacity) : rows;
    }
  }
  __syncthreads();
  for (int64_t queue = threadIdx.x; queue < queues; queue += kThreads) {
    first_row[queue] += start[queue % E];
  }
}

// A block gives the tokens of one tile, in their order, the places of one of their choices.
__global__ void place_kernel(Routing routing, Items items, const int32_t* __restrict__ first_row,
                             int32_t* __restrict__ slot, int32_t* __restrict__ source,
                             int32_t* __restrict__ destination) {
  auto* counters = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const RouteShape& shape = routing.shape;
  const int64_t E = shape.experts, k = shape.top_k;
  const int64_t tile_index = blockIdx.x / k, j = blockIdx.x % k;
  const Tile tile = routing.tiling.at(tile_index);
  int64_t assignment[kRounds];
  unsigned expert[kRounds];
  int32_t before[kRounds];
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = position_of(tile, round);
    expert[round] = kNothing;
    if (at >= tile.end) continue;
    const int64_t token = items.tokens == nullptr ? at : items.tokens[at];
    assignment[round] = token * k + j;
    if (items.keys[at] != kRouteNoKey) {
      expert[round] = static_cast<unsigned>(routing.expert[assignment[round]]);
    } else {
      slot[assignment[round]] = destination[assignment[round]] = -1;
    }
  }
  rank(expert, static_cast<int>(E), counters, before);
  const int32_t* warps_before = counters + threadIdx.x / kWarp * E;
  const int32_t* tiles_before = routing.counts.queues + (tile_index * k + j) * E;
  for (int round = 0; round < kRounds; ++round) {
    const unsigned e = expert[round];
    if (e == kNothing) continue;
    const int32_t place = tiles_before[e] + warps_before[e] + before[round];
    const bool kept = shape.capacity == 0 || place < shape.capacity;
    const int32_t row = kept ? first_row[tile.group * E + e] + place : -1;
    slot[assignment[round]] = place;
    destination[assignment[round]] = row;
    if (kept) source[row] = static_cast<int32_t>(assignment[round]);
  }
}

// The workspace, in numbers of 32 bits.
struct Layout {
  explicit Layout(const RouteShape& shape)
      : per_group((shape.group_tokens() + kTile - 1) / kTile),
        tiles(shape.groups * per_group),
        items(3 * shape.tokens),
        digits(kPasses * tiles * kDigits),
        queues(tiles * shape.top_k * shape.experts),
        plan(3 * shape.queues()) {}

  int64_t per_group, tiles, items, digits, queues, plan;
};

// Sorts items, given by index, in place.
cudaError_t sort(const Routing& routing, int64_t tiles, Items items, Items spare,
                 cudaStream_t stream) {
  static_assert(kPasses % 2 == 0, "the last pass ends where the first began");
  const size_t bytes = (kWarps + 1) * kDigits * sizeof(int32_t);
  for (int pass = 0; pass < kPasses; ++pass) {
    Items from = items;
    if (pass == 0) from.tokens = nullptr;
    const cudaError_t error =
        launch(sort_kernel, tiles, kThreads, bytes, stream, routing, pass, from, spare);
    if (error != cudaSuccess) return error;
    std::swap(items, spare);
  }
  return cudaSuccess;
}

}  // namespace

int64_t route_queues_workspace(const RouteShape& shape) {
  const Layout layout(shape);
  return (layout.items + layout.digits + layout.queues + layout.plan) *
         static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t route_queues(const RouteShape& shape, const RouteOptions& options, uint32_t* keys,
                         const RouteOutputs& out, void* workspace, cudaStream_t stream) {
  const Layout layout(shape);
  auto* words = static_cast<int32_t*>(workspace);
  const Items spare{reinterpret_cast<uint32_t*>(words), words + shape.tokens};
  Items items{keys, words + 2 * shape.tokens};
  const Counts counts{words + layout.items, words + layout.items + layout.digits};
  int32_t* first_row = counts.queues + layout.queues;
  const Routing routing{shape, {shape.group_tokens(), layout.per_group}, counts, out.expert};

  const size_t to_clear = (layout.digits + layout.queues) * sizeof(int32_t);
  cudaError_t error = cudaMemsetAsync(counts.digits, 0, to_clear, stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(out.source, 0xFF, shape.rows() * sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  if (shape.tokens > 0) {
    error = launch(count_kernel, (shape.tokens + kThreads - 1) / kThreads, kThreads, 0, stream,
                   routing, options.prioritized ? 0 : kPasses, static_cast<const uint32_t*>(keys));
    if (error != cudaSuccess) return error;
    if (options.prioritized) error = sort(routing, layout.tiles, items, spare, stream);
    if (error != cudaSuccess) return error;
  }
  if (!options.prioritized) items.tokens = nullptr;
  error = launch(plan_kernel, 1, kThreads, shape.experts * sizeof(int32_t), stream, routing,
                 first_row + shape.queues(), first_row, out.counts, out.first, out.used);
  if (error != cudaSuccess || shape.tokens == 0) return error;
  return launch(place_kernel, layout.tiles * shape.top_k, kThreads,
                kWarps * shape.experts * sizeof(int32_t), stream, routing, items,
                static_cast<const int32_t*>(first_row), out.slot, out.source, out.destination);
}

}  // namespace swin_moe::cuda
