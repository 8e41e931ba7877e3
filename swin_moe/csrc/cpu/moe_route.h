// Routing on the CPU: from logits to row maps, in passes, and the gradient of the logits.
//
// A pass computes its range, so the caller chooses how to split it over threads; no two ranges
// write the same memory, and sums over tokens are first taken per chunk of fixed size, so that no
// bit depends on the split. The order is route_scores, then route_sums and route_queues,
// then route_plan, then route_rows. Everything is fp32; the semantics are in
// swin_moe/ops/moe_route.py.
#pragma once

#include "../types.h"
#include "range.h"

namespace swin_moe::cpu {

constexpr int64_t kRouteChunk = 256;  // tokens

inline int64_t route_chunks(const RouteShape& shape) {
  return (shape.tokens + kRouteChunk - 1) / kRouteChunk;
}
// Floats that a chunk sums: as `sums` [3, E], then as `scalars`.
inline int64_t route_part_size(const RouteShape& shape) {
  return 3 * shape.experts + kRouteScalars;
}

struct RouteInputs {
  const float* logits;  // [T, E]
  const float* noise;   // [T, E], or null
  const float* bias;    // [E], or null; the gradient needs none
};

// Incoming gradients. Null: zeros.
struct RouteGrads {
  const float* gate;     // [T, k]
  const float* sums;     // [3, E]
  const float* scalars;  // [kRouteScalars], of which only the first counts
};

// Choices, gates, keys [T] and parts [chunks, part size].        Range: chunks.
void route_scores(const RouteShape& shape, const RouteOptions& options, Range chunks,
                  const RouteInputs& in, int64_t* expert, float* gate, uint32_t* keys,
                  float* parts);

// Adds the chunks' parts, in their order.
void route_sums(const RouteShape& shape, const float* parts, float* sums, float* scalars);

// Slots, and per queue how many assignments and how many of them are first choices, both [G, E].
//                                                                Range: groups.
void route_queues(const RouteShape& shape, const RouteOptions& options, Range groups,
                  const uint32_t* keys, const int64_t* expert, int32_t* slot, int64_t* queued,
                  int64_t* queued_first);

// The experts' numbers, each [E], and the first row of each queue, [G, E].
void route_plan(const RouteShape& shape, const int64_t* queued, const int64_t* queued_first,
                int64_t* counts, int64_t* first, int64_t* used, int64_t* first_row);

// Row of each assignment, and assignment of each row that has one; `source` is -1 before.
//                                                                Range: tokens.
void route_rows(const RouteShape& shape, Range tokens, const int64_t* expert, const int32_t* slot,
                const int64_t* first_row, int32_t* destination, int32_t* source);

// Gradient of the logits, for the experts that route_scores chose. Range: chunks.
void route_backward(const RouteShape& shape, const RouteOptions& options, Range chunks,
                    const RouteGrads& grads, const RouteInputs& in, const int64_t* expert,
                    float* grad_logits);

// Whether all of these choices are experts.                      Range: assignments.
bool route_valid(const RouteShape& shape, Range assignments, const int64_t* expert);

}  // namespace swin_moe::cpu
