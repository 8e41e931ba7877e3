// Runs CUDA kernels on a CPU, to test their logic where there is no GPU: enough of the language for
// the kernels of this repository, compiled by a C++ compiler with this folder before the toolkit's.
//
// Each thread of a block is a fiber, and fibers change only at barriers and at the collectives of a
// warp, which exchange through memory and are barriers of the warp. So what a kernel leaves to
// chance, the order of threads between barriers and of blocks, is fixed here, and can be reversed:
// a kernel that lacks a barrier gives other results then. Shared memory starts out as NaNs (all
// bits set) and ends with a guard. An error stops the launch: a barrier that not all threads reach,
// collectives that differ within a warp, a row of a matrix that is misaligned or outside of shared
// memory, a copy that nobody waits for, a guard that was overwritten.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounded one by one: tests/ops/emulation.py forbids the compiler to fuse them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

namespace cuda_emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xFF, kGuard = 0xA5;

enum class State { kRunnable, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* to;
  const void* from;  // or null: zeros
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::kDone;
  const char* collective = nullptr;  // that it waits in
  int exchange = 0;                  // which of two buffers its warp's next exchange takes
  std::vector<Copy> copies;          // that it has not waited for
};

// What lanes bring to a collective. There are two, taken in turn: a lane that goes ahead fills the
// other one, and cannot come back to this one before all have read it.
struct alignas(16) Slot {
  unsigned char bytes[32];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots[2];
  std::vector<int> votes;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int threads = 0;
  int current = 0;
  bool reversed = false;
  int launches = 0;  // of kernels, and fills of memory, since the tests set it to 0
  std::string error;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void fail(const std::string& why) {
  Machine& m = machine();
  if (!m.error.empty()) return;
  m.error = why + ", block " + std::to_string(blockIdx.x);
}

// Back to the scheduler, until it resumes this thread.
inline void yield(State state, const char* collective) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  fiber.collective = collective;
  if (_setjmp(fiber.here) == 0) _longjmp(m.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {  // one turn per block
    machine().kernel();
    if (!machine().fibers[machine().current].copies.empty()) fail("copies are not waited for");
    yield(State::kDone, nullptr);
  }
}

inline void resume(int thread) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.stack.reset(new char[kStackBytes]);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// Lets threads first to last go on if all of them wait in the same collective.
inline bool release(int first, int last, State state) {
  Machine& m = machine();
  for (int t = first; t < last; ++t) {
    if (m.fibers[t].state != state) return false;
    if (std::strcmp(m.fibers[t].collective, m.fibers[first].collective) != 0) {
      fail(std::string(m.fibers[t].collective) + " meets " + m.fibers[first].collective);
    }
  }
  for (int t = first; t < last; ++t) m.fibers[t].state = State::kRunnable;
  return true;
}

inline bool all_done() {
  Machine& m = machine();
  for (int t = 0; t < m.threads; ++t) {
    if (m.fibers[t].state != State::kDone) return false;
  }
  return true;
}

// Takes a warp as far as it goes without the others, which is the worst for them. False if it has
// been nowhere.
inline bool run_warp(int first) {
  Machine& m = machine();
  bool progress = false;
  do {
    for (int i = 0; i < kWarp; ++i) {
      const int thread = first + (m.reversed ? kWarp - 1 - i : i);
      if (m.fibers[thread].state != State::kRunnable) continue;
      progress = true;
      resume(thread);
    }
  } while (m.error.empty() && release(first, first + kWarp, State::kAtWarp));
  return progress;
}

inline void run_block() {
  Machine& m = machine();
  for (int t = 0; t < m.threads; ++t) m.fibers[t].state = State::kRunnable;
  while (!all_done() && m.error.empty()) {
    bool progress = false;
    for (int t = 0; t < m.threads; t += kWarp) {
      progress |= run_warp(m.reversed ? m.threads - kWarp - t : t);
    }
    progress |= release(0, m.threads, State::kAtBlock);
    if (progress || all_done()) continue;
    for (int t = 0; t < m.threads; ++t) {
      if (m.fibers[t].state == State::kDone) continue;
      fail("thread " + std::to_string(t) + " waits forever in " + m.fibers[t].collective);
    }
  }
}

// Sets the machine up for blocks of so many threads and so much shared memory.
inline void prepare(int threads, size_t shared_bytes) {
  Machine& m = machine();
  // Fibers that an error left in the middle of a kernel start afresh.
  if (!m.error.empty()) m.fibers.clear();
  m.error.clear();
  if (m.fibers.size() < static_cast<size_t>(threads)) {
    m.fibers = std::vector<Fiber>(threads);
  }
  m.threads = threads;
  for (auto& slots : m.slots) slots.assign(threads, Slot{});
  m.votes.assign(threads, 0);
  m.storage.reset(new unsigned char[shared_bytes + kGuardBytes + 16]);
  m.shared = m.storage.get() + (16 - reinterpret_cast<uintptr_t>(m.storage.get()) % 16) % 16;
  m.shared_bytes = shared_bytes;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t, Arguments... arguments) {
  Machine& m = machine();
  ++m.launches;
  if (blocks < 1 || blocks > 0x7FFFFFFF || threads < 1 || threads > 1024) {
    return cudaErrorInvalidValue;
  }
  // Every GPU since compute capability 8.0 has this much for one block.
  if (shared_bytes > 99 * 1024) return cudaErrorInvalidValue;
  prepare((threads + kWarp - 1) / kWarp * kWarp, shared_bytes);
  m.kernel = [&] { kernel(arguments...); };
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks && m.error.empty(); ++i) {
    blockIdx.x = static_cast<unsigned>(m.reversed ? blocks - 1 - i : i);
    std::memset(m.shared, kPoison, shared_bytes);
    std::memset(m.shared + shared_bytes, kGuard, kGuardBytes);
    run_block();
    for (size_t g = 0; g < kGuardBytes; ++g) {
      if (m.shared[shared_bytes + g] != kGuard) fail("shared memory overflows");
    }
  }
  m.kernel = nullptr;
  return m.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

inline unsigned char* dynamic_shared_memory() { return machine().shared; }

// Lanes bring `mine` and see what all of their warp have brought.
template <typename V>
const Slot* exchange(const V& mine, const char* collective) {
  static_assert(sizeof(V) <= sizeof(Slot::bytes), "a slot is too small");
  Machine& m = machine();
  const int thread = m.current;
  Slot* slots = m.slots[m.fibers[thread].exchange ^= 1].data();
  std::memcpy(slots[thread].bytes, &mine, sizeof(mine));
  yield(State::kAtWarp, collective);
  return slots + thread / kWarp * kWarp;
}

template <typename V>
V brought(const Slot* slots, int lane) {
  V value;
  std::memcpy(&value, slots[lane].bytes, sizeof(value));
  return value;
}

// Without denormals, and with the largest relative error that the instruction may have.
inline float exp2_flushed(float x) {
  const float result = std::exp2(x) * (1.0f + 0x1p-22f);
  return result < 1.17549435e-38f ? 0.0f : result;  // a NaN stays one
}

// Nothing arrives before the thread waits for it, which is the worst that may happen.
inline void copy_async(void* to, const void* from, bool valid) {
  Machine& m = machine();
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (addresses % 16 != 0) fail("an asynchronous copy is misaligned");
  m.fibers[m.current].copies.push_back({to, valid ? from : nullptr});
}

inline void wait_for_copies() {
  Machine& m = machine();
  for (const Copy& copy : m.fibers[m.current].copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, 16);
    } else {
      std::memcpy(copy.to, copy.from, 16);
    }
  }
  m.fibers[m.current].copies.clear();
}

inline int lane_id() { return machine().current % kWarp; }

// Numbers 2t and 2t + 1 of the row g of each matrix of 8 rows that lanes brought, or the transpose.
template <typename T>
void take_matrices(uint32_t (&to)[4], const T* row, bool transposed, const char* collective) {
  static_assert(sizeof(T) == 2, "matrices are of 16-bit numbers");
  Machine& m = machine();
  struct Row {
    uint16_t numbers[8];
  } mine;
  const auto* from = reinterpret_cast<const unsigned char*>(row);
  if (from < m.shared || from + sizeof(mine) > m.shared + m.shared_bytes ||
      (from - m.shared) % 16 != 0) {
    fail("a row of a matrix is misaligned or not in shared memory");
    std::memset(&mine, kPoison, sizeof(mine));
  } else {
    std::memcpy(&mine, from, sizeof(mine));
  }
  const Slot* slots = exchange(mine, collective);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = transposed ? 2 * t + e : g, c = transposed ? g : 2 * t + e;
      pair[e] = brought<Row>(slots, matrix * 8 + r).numbers[c];
    }
    to[matrix] = pair[0] | pair[1] << 16;
  }
}

template <typename T>
void load_matrices(uint32_t (&to)[4], const T* row) {
  take_matrices(to, row, false, "ldmatrix");
}

template <typename T>
void load_matrices_transposed(uint32_t (&to)[4], const T* row) {
  take_matrices(to, row, true, "ldmatrix.trans");
}

// mma.m16n8k16: number i of the eight of a lane's part of A is in row g for i in 0, 1, 4, 5, else
// g + 8, and in column 2t + i % 2, plus 8 from i = 4; number i of the four of B is in row
// 2t + i % 2, plus 8 from i = 2, and in column g; number i of the four of C and D is in row g, plus
// 8 from i = 2, and in column 2t + i % 2. Two numbers share a register, the first one the low half.
template <typename T>
void multiply_accumulate(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    T a[8];
    T b[4];
  } mine;
  static_assert(sizeof(mine) == 24, "fragments are 16-bit numbers");
  std::memcpy(mine.a, a, sizeof(mine.a));
  const uint32_t b[2] = {b0, b1};
  std::memcpy(mine.b, b, sizeof(mine.b));
  const Slot* slots = exchange(mine, "mma");
  const int g = lane_id() / 4, t = lane_id() % 4;
  float left[2][16], right[16][2];
  for (int other = 0; other < 4; ++other) {  // the lanes that hold these rows and columns
    for (int i = 0; i < 8; ++i) {
      const int row = i % 4 / 2, column = 2 * other + i % 2 + i / 4 * 8;
      left[row][column] = static_cast<float>(brought<Fragments>(slots, g * 4 + other).a[i]);
    }
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        const int row = 2 * other + i % 2 + i / 2 * 8;
        const Fragments theirs = brought<Fragments>(slots, (2 * t + e) * 4 + other);
        right[row][e] = static_cast<float>(theirs.b[i]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) sum += left[i / 2][k] * right[k][i % 2];
    d[i] += sum;
  }
}

}  // namespace cuda_emulation

// As CUDA does, refuses a null pointer even for no bytes at all.
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  ++cuda_emulation::machine().launches;
  if (to == nullptr) return cudaErrorInvalidValue;
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline void __syncwarp() { cuda_emulation::yield(cuda_emulation::State::kAtWarp, "__syncwarp"); }
inline void __syncthreads() {
  cuda_emulation::yield(cuda_emulation::State::kAtBlock, "__syncthreads");
}

inline int __syncthreads_or(int vote) {
  auto& m = cuda_emulation::machine();
  m.votes[m.current] = vote;
  cuda_emulation::yield(cuda_emulation::State::kAtBlock, "__syncthreads_or");
  int any = 0;
  for (int t = 0; t < m.threads; ++t) any |= m.votes[t];
  // Nobody votes anew before all have counted.
  cuda_emulation::yield(cuda_emulation::State::kAtBlock, "__syncthreads_or");
  return any;
}

template <typename V>
V __shfl_sync(unsigned mask, V value, int lane) {
  if (mask != ~0u) cuda_emulation::fail("a shuffle of some lanes");
  const auto* slots = cuda_emulation::exchange(value, "shfl");
  return cuda_emulation::brought<V>(slots, lane % cuda_emulation::kWarp);
}

template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int lane_mask) {
  return __shfl_sync(mask, value, cuda_emulation::lane_id() ^ lane_mask);
}

template <typename V>
V __shfl_up_sync(unsigned mask, V value, int by) {
  const int lane = cuda_emulation::lane_id();
  return __shfl_sync(mask, value, lane < by ? lane : lane - by);
}

inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  if (mask != ~0u) cuda_emulation::fail("a match of some lanes");
  const auto* slots = cuda_emulation::exchange(value, "match");
  unsigned same = 0;
  for (int lane = 0; lane < cuda_emulation::kWarp; ++lane) {
    same |= static_cast<unsigned>(cuda_emulation::brought<unsigned>(slots, lane) == value) << lane;
  }
  return same;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}
