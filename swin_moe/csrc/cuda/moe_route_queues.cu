// Queues by stable counting: a radix sort of the tokens of each group by their keys, ten bits at a
// time, then one more pass of the same kind in which the digit is the expert.
//
// A pass has a block per tile. A group of one tile is sorted by its block in one launch. In longer
// groups the counts of each digit in each tile are known before a pass: the block that writes an
// item for the next pass counts it at the tile where it lands. So a pass is one launch: a block
// adds up the digits of the tiles before its own, and ranks its items by warp.
#include "moe_route_queues.cuh"

#include <utility>

namespace swin_moe::cuda {
namespace {

constexpr int kWarp = 32, kWarps = kQueueWarps, kThreads = kQueueThreads;
constexpr int kDigitsEach = kDigits / kThreads;  // that a thread adds up
constexpr unsigned kNothing = ~0u;               // the digit of no item

// Where a tile lies. Tiles do not reach across groups.
struct Tile {
  int group;
  int index;  // in the group
  int begin;
  int end;
  int rounds;

  __device__ Tile(const Tiling& tiling, int tile)
      : group(tile / tiling.per_group),
        index(tile - group * tiling.per_group),
        begin(group * tiling.group_tokens + index * tiling.size()),
        end((group + 1) * tiling.group_tokens),
        rounds(tiling.rounds) {
    if (end - begin > tiling.size()) end = begin + tiling.size();
  }

  // The position that item `round` of this thread has: warps lie side by side.
  __device__ int at(int round) const {
    const int thread = static_cast<int>(threadIdx.x);
    return begin + (thread / kWarp * rounds + round) * kWarp + thread % kWarp;
  }
};

// For each item of this thread, how many of its warp's with the same digit come before; `counters`
// [kWarps, values] then holds how many of each digit the warps before have, and `totals` [values],
// if given, how many there are.
template <int kRounds>
__device__ void rank(const unsigned (&digit)[kRounds], int rounds, int values, int32_t* counters,
                     int32_t* totals, int32_t (&before)[kRounds]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  int32_t* mine = counters + thread / kWarp * values;
  for (int n = thread; n < kWarps * values; n += kThreads) counters[n] = 0;
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (round >= rounds) break;
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
    if (totals != nullptr) totals[value] = sum;
  }
  __syncthreads();
}

// The sum over the threads before this one.
__device__ int32_t sum_before(int32_t value, int32_t* shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  int32_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) shared[thread / kWarp] = sum;
  __syncthreads();
  for (int warp = 0; warp < thread / kWarp; ++warp) sum += shared[warp];
  return sum - value;
}

// Adds to the counters [kWarps, kDigits] where the digits of this tile start in its group. `totals`
// holds the tile's numbers of each digit, then of all tiles of a group.
__device__ void add_starts(const Queues& queues, const Tile& tile, int pass, int32_t* counters,
                           int32_t* totals) {
  const int first = static_cast<int>(threadIdx.x) * kDigitsEach;  // of this thread's digits
  int32_t earlier[kDigitsEach] = {}, all[kDigitsEach] = {}, sum = 0;
  for (int d = 0; d < kDigitsEach; ++d) all[d] = queues.alone() ? totals[first + d] : 0;
  if (!queues.alone()) {
    const int per_group = queues.sorted.per_group;
    const int64_t tiles = queues.shape.groups * per_group;
    const int32_t* counts =
        queues.digits + (pass * tiles + tile.group * per_group) * kDigits + first;
    for (int n = 0; n < per_group; ++n) {
#pragma unroll
      for (int d = 0; d < kDigitsEach; ++d) {
        const int32_t here = counts[static_cast<int64_t>(n) * kDigits + d];
        if (n < tile.index) earlier[d] += here;
        all[d] += here;
      }
    }
  }
  for (int d = 0; d < kDigitsEach; ++d) sum += all[d];
  int32_t start = sum_before(sum, totals + kDigits);
#pragma unroll
  for (int d = 0; d < kDigitsEach; ++d) {
    for (int warp = 0; warp < kWarps; ++warp) {
      counters[warp * kDigits + first + d] += start + earlier[d];
    }
    start += all[d];
  }
  __syncthreads();
}

// Sorts a tile of `from`, by one digit of the keys, to where its items belong in `to`.
__device__ void sort_tile(const Queues& queues, int pass, const Items& from, const Items& to,
                          const int64_t* expert) {
  auto* counters = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  int32_t* totals = counters + kWarps * kDigits;
  const Tile tile(queues.sorted, static_cast<int>(blockIdx.x));
  unsigned digit[kSortRounds];
  int32_t before[kSortRounds];
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    if (round >= tile.rounds) break;
    const int at = tile.at(round);
    digit[round] =
        at < tile.end ? static_cast<unsigned>(digit_of(from.keys[at], pass)) : kNothing;
  }
  rank(digit, tile.rounds, kDigits, counters, totals, before);
  add_starts(queues, tile, pass, counters, totals);
  const int32_t* mine = counters + threadIdx.x / kWarp * kDigits;
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    if (round >= tile.rounds) break;
    if (digit[round] == kNothing) continue;
    const int at = tile.at(round);
    const uint32_t key = from.keys[at];
    const int32_t token = from.tokens == nullptr ? at : from.tokens[at];
    const int place =
        tile.group * queues.sorted.group_tokens + mine[digit[round]] + before[round];
    to.keys[place] = key;
    to.tokens[place] = token;
    if (pass + 1 < kPasses) {
      if (!queues.alone()) count_digit(queues, pass + 1, place, key);
    } else if (key != kRouteNoKey) {
      const int64_t k = queues.shape.top_k;
      for (int64_t j = 0; j < k; ++j) count_choice(queues, place, j, expert[token * k + j]);
    }
  }
}

// Does passes `pass` to `last`. Several are for groups of one tile.
__global__ void __launch_bounds__(kThreads)
    sort_kernel(Queues queues, int pass, int last, Items from, Items to, const int64_t* expert) {
  for (; pass <= last; ++pass) {
    sort_tile(queues, pass, from, to, expert);
    __syncthreads();  // all that the next pass reads is written
    const Items written = to;
    to = {from.keys, from.tokens == nullptr ? queues.items[0].tokens : from.tokens};
    from = written;
  }
}

// Marks the rows that no assignment has. For all threads of the launch.
__device__ void clear_empty_rows(const Queues& queues, int rows, int32_t* source) {
  const RouteShape& shape = queues.shape;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (!shape.padded) {
    for (int64_t r = queues.rows[queues.count()] + thread; r < rows; r += threads) source[r] = -1;
    return;
  }
  const int per_expert = static_cast<int>(shape.groups * shape.capacity);
  for (int64_t r = thread; r < rows; r += threads) {
    const int e = static_cast<int>(r) / per_expert;
    const int32_t* own = queues.rows + e * shape.groups;
    if (r - static_cast<int64_t>(e) * per_expert >= own[shape.groups] - own[0]) source[r] = -1;
  }
}

// The first row of a queue.
__device__ int32_t first_row(const Queues& queues, int64_t e, int64_t group) {
  const RouteShape& shape = queues.shape;
  const int32_t* own = queues.rows + e * shape.groups;
  if (!shape.padded) return own[group];
  return static_cast<int32_t>(e * shape.groups * shape.capacity) + own[group] - own[0];
}

// A block gives the tokens of one tile, in their order, the places of one of their choices.
__global__ void __launch_bounds__(kThreads)
    place_kernel(Queues queues, Items items, int rows, const int64_t* __restrict__ expert,
                 int32_t* __restrict__ slot, int32_t* __restrict__ source,
                 int32_t* __restrict__ destination) {
  clear_empty_rows(queues, rows, source);
  auto* counters = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const RouteShape& shape = queues.shape;
  const int E = static_cast<int>(shape.experts), k = static_cast<int>(shape.top_k);
  const int tile_index = static_cast<int>(blockIdx.x) / k, j = static_cast<int>(blockIdx.x) % k;
  if (tile_index >= shape.groups * queues.placed.per_group) return;
  const Tile tile(queues.placed, tile_index);
  int64_t assignment[kPlaceRounds];
  unsigned chosen[kPlaceRounds];
  int32_t before[kPlaceRounds];
#pragma unroll
  for (int round = 0; round < kPlaceRounds; ++round) {
    if (round >= tile.rounds) break;
    const int at = tile.at(round);
    chosen[round] = kNothing;
    if (at >= tile.end) continue;
    const int64_t token = items.tokens == nullptr ? at : items.tokens[at];
    assignment[round] = token * k + j;
    if (items.keys[at] != kRouteNoKey) {
      chosen[round] = static_cast<unsigned>(expert[assignment[round]]);
    } else {
      slot[assignment[round]] = destination[assignment[round]] = -1;
    }
  }
  rank(chosen, tile.rounds, E, counters, nullptr, before);
  const int32_t* warps_before = counters + threadIdx.x / kWarp * E;
  const int64_t cells = queues.cells(), cell = j * queues.placed.per_group + tile.index;
#pragma unroll
  for (int round = 0; round < kPlaceRounds; ++round) {
    if (round >= tile.rounds) break;
    const unsigned e = chosen[round];
    if (e == kNothing) continue;
    const int32_t* counts = queues.counts + (e * shape.groups + tile.group) * cells;
    const int32_t place = counts[cell] - counts[0] + warps_before[e] + before[round];
    const bool kept = shape.capacity == 0 || place < shape.capacity;
    const int32_t row = kept ? first_row(queues, e, tile.group) + place : -1;
    slot[assignment[round]] = place;
    destination[assignment[round]] = row;
    if (kept) source[row] = static_cast<int32_t>(assignment[round]);
  }
}

// Sizes of the workspace, in numbers of 32 bits.
struct Layout {
  explicit Layout(const Queues& queues)
      : digits(queues.alone() ? 0
                              : kPasses * queues.shape.groups * queues.sorted.per_group * kDigits),
        counts(queues.count() * queues.cells() + 1),
        rows(queues.count() + 1),
        items(queues.shape.tokens) {}

  int64_t digits, counts, rows, items;
};

}  // namespace

Queues route_queues(const RouteShape& shape, void* workspace) {
  Queues queues{shape, Tiling(shape, kSortRounds), Tiling(shape, kPlaceRounds),
                nullptr, nullptr, nullptr, {}};
  const Layout layout(queues);
  queues.digits = static_cast<int32_t*>(workspace);
  queues.counts = queues.digits + layout.digits;
  queues.rows = queues.counts + layout.counts;
  queues.items[0] = {nullptr, queues.rows + layout.rows};
  queues.items[1].tokens = queues.items[0].tokens + layout.items;
  queues.items[1].keys = reinterpret_cast<uint32_t*>(queues.items[1].tokens + layout.items);
  return queues;
}

int64_t route_queues_workspace(const RouteShape& shape) {
  const Queues queues{shape, Tiling(shape, kSortRounds), Tiling(shape, kPlaceRounds),
                      nullptr, nullptr, nullptr, {}};
  const Layout layout(queues);
  return (layout.digits + layout.counts + layout.rows + 3 * layout.items) *
         static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t route_clear(const Queues& queues, bool prioritized, cudaStream_t stream) {
  const Layout layout(queues);
  int32_t* first = prioritized ? queues.digits : queues.counts;
  const int64_t numbers = (prioritized ? layout.digits : 0) + layout.counts;
  return cudaMemsetAsync(first, 0, numbers * sizeof(int32_t), stream);
}

cudaError_t route_sort(const Queues& queues, uint32_t* keys, const int64_t* expert, Items& sorted,
                       cudaStream_t stream) {
  const size_t bytes = ((kWarps + 1) * kDigits + kWarps) * sizeof(int32_t);
  const int64_t tiles = queues.shape.groups * queues.sorted.per_group;
  Items from{keys, nullptr}, to = queues.items[1];
  const int launches = queues.alone() ? 1 : kPasses, passes = kPasses / launches;
  for (int n = 0; n < launches; ++n) {
    const cudaError_t error = launch(sort_kernel, tiles, kThreads, bytes, stream, queues,
                                     n * passes, (n + 1) * passes - 1, from, to, expert);
    if (error != cudaSuccess) return error;
    if (n == 0) from.tokens = queues.items[0].tokens;
    std::swap(from, to);
  }
  static_assert(kPasses % 2 == 1, "the last pass writes where the first did");
  sorted = queues.items[1];
  return cudaSuccess;
}

cudaError_t route_place(const Queues& queues, const Items& items, const RouteOutputs& out,
                        cudaStream_t stream) {
  const RouteShape& shape = queues.shape;
  constexpr int64_t kRowsPerBlock = 16 * kThreads;  // to be marked
  const int64_t tiles = shape.groups * queues.placed.per_group * shape.top_k;
  const int64_t least = (shape.rows() + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t blocks = tiles > least ? tiles : least;
  if (blocks == 0) return cudaSuccess;
  return launch(place_kernel, blocks, kThreads, kWarps * shape.experts * sizeof(int32_t), stream,
                queues, items, static_cast<int>(shape.rows()),
                static_cast<const int64_t*>(out.expert), out.slot, out.source, out.destination);
}

}  // namespace swin_moe::cuda
