// The queues of a routing: integers only.
#include <algorithm>
#include <cstring>
#include <memory>

#include "moe_route.h"

namespace swin_moe::cpu {
namespace {

constexpr int64_t kDigits = 4, kDigitBits = 8, kDigitValues = 1 << kDigitBits;

int64_t digit_of(uint64_t item, int64_t digit) {
  return static_cast<int64_t>(item >> (32 + digit * kDigitBits)) & (kDigitValues - 1);
}

// Sorts items by their upper 32 bits, stable, with `spare` for as many. Returns where the result
// is: in one of the two.
uint64_t* radix_sort(int64_t count, uint64_t* items, uint64_t* spare) {
  int64_t starts[kDigits][kDigitValues] = {};
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t digit = 0; digit < kDigits; ++digit) ++starts[digit][digit_of(items[n], digit)];
  }
  for (int64_t digit = 0; digit < kDigits; ++digit) {
    int64_t* start = starts[digit];
    if (start[digit_of(items[0], digit)] == count) continue;  // all are the same
    int64_t before = 0;
    for (int64_t value = 0; value < kDigitValues; ++value) {
      const int64_t here = start[value];
      start[value] = before;
      before += here;
    }
    for (int64_t n = 0; n < count; ++n) spare[start[digit_of(items[n], digit)]++] = items[n];
    std::swap(items, spare);
  }
  return items;
}

}  // namespace

void route_queues(const RouteShape& shape, const RouteOptions& options, Range groups,
                  const uint32_t* keys, const int64_t* expert, int32_t* slot, int64_t* queued,
                  int64_t* queued_first) {
  const int64_t E = shape.experts, k = shape.top_k, size = shape.group_tokens();
  std::fill_n(queued + groups.begin * E, (groups.end - groups.begin) * E, 0);
  std::fill_n(queued_first + groups.begin * E, (groups.end - groups.begin) * E, 0);
  if (size == 0) return;
  const std::unique_ptr<uint64_t[]> memory(new uint64_t[2 * size]);
  for (int64_t group = groups.begin; group < groups.end; ++group) {
    const int64_t token = group * size;
    int64_t* length = queued + group * E;
    int64_t count = 0;
    for (int64_t t = token; t < token + size; ++t) {
      if (keys[t] != kRouteNoKey) {
        memory[count++] = static_cast<uint64_t>(keys[t]) << 32 | static_cast<uint64_t>(t - token);
      } else {
        std::fill_n(slot + t * k, k, -1);
      }
    }
    const uint64_t* order = memory.get();
    if (options.prioritized && count > 0) {
      order = radix_sort(count, memory.get(), memory.get() + size);
    }
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t a = (token + static_cast<int64_t>(order[n] & 0xffffffffu)) * k + j;
        slot[a] = static_cast<int32_t>(length[expert[a]]++);
      }
      if (j == 0) std::copy_n(length, E, queued_first + group * E);
    }
  }
}

void route_plan(const RouteShape& shape, const int64_t* queued, const int64_t* queued_first,
                int64_t* counts, int64_t* first, int64_t* used, int64_t* first_row) {
  int64_t row = 0;
  for (int64_t e = 0; e < shape.experts; ++e) {
    counts[e] = first[e] = 0;
    const int64_t start = shape.padded ? e * shape.groups * shape.capacity : row;
    row = start;
    for (int64_t queue = e; queue < shape.queues(); queue += shape.experts) {
      counts[e] += queued[queue];
      first[e] += queued_first[queue];
      first_row[queue] = row;
      row += shape.capacity > 0 ? std::min(queued[queue], shape.capacity) : queued[queue];
    }
    used[e] = row - start;
  }
}

void route_rows(const RouteShape& shape, Range tokens, const int64_t* expert, const int32_t* slot,
                const int64_t* first_row, int32_t* destination, int32_t* source) {
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const int64_t* starts = first_row + t / shape.group_tokens() * shape.experts;
    for (int64_t a = t * shape.top_k; a < (t + 1) * shape.top_k; ++a) {
      const bool kept = slot[a] >= 0 && (shape.capacity == 0 || slot[a] < shape.capacity);
      destination[a] = kept ? static_cast<int32_t>(starts[expert[a]] + slot[a]) : -1;
      if (kept) source[destination[a]] = static_cast<int32_t>(a);
    }
  }
}

bool route_valid(const RouteShape& shape, Range assignments, const int64_t* expert) {
  bool ok = true;
  for (int64_t a = assignments.begin; a < assignments.end; ++a) {
    ok &= expert[a] >= 0 && expert[a] < shape.experts;
  }
  return ok;
}

}  // namespace swin_moe::cpu
