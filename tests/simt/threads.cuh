// CUDA's threads on one processor, for kernel code that a C++ compiler builds.
//
// Every thread of every CTA is a fiber; a fiber runs until it waits. Barriers, shuffles and votes wait for the warp or
// the CTA as they do on a GPU, so code that leaves a thread behind ends in `deadlock`. Who goes on, and when a bulk copy
// lands, is random: the seed decides.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __device__
#define __global__ inline
#define __constant__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(threads, ctas)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH__ 900

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

template <class T>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T>
constexpr T max(T a, T b) { return a < b ? b : a; }

namespace simt {

struct Meeting {  // of a number of fibers
  int arrived = 0;
  std::vector<struct Fiber*> waiting;
};

// What the lanes bring to their common operations, and what comes of it. Two take turns: while some lanes bring their
// words for the next operation, others may still read those of the last.
struct Table {
  u32 word[32][6];
  u32 result[32][4];
};

struct Warp {
  Meeting meeting;
  Table tables[2];
  u64 wakes_at = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  u32 thread, block;
  int turn = 0;  // of the warp's tables
  Warp* warp;
  Meeting* named_barriers;  // of the CTA
};

inline u64 random_state;
inline u32 random(u32 end) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
  return (random_state >> 33) * end >> 31;
}

// First in, first out, but for some disorder.
struct Queue {
  std::vector<Fiber*> fibers;
  size_t first = 0;

  bool empty() const { return first == fibers.size(); }
  void push_back(Fiber* fiber) { fibers.push_back(fiber); }
  Fiber* pop() {
    std::swap(fibers[first], fibers[first + random(min<size_t>(fibers.size() - first, 32))]);
    Fiber* fiber = fibers[first++];
    if (first == 4096) {
      fibers.erase(fibers.begin(), fibers.begin() + first);
      first = 0;
    }
    return fiber;
  }
};

// Bytes that arrive while the threads work.
struct Copy {
  u64 due;
  char* to;
  const char* from;
  u32 bytes;
  struct Mbarrier* bar;  // that hears of it, or null
};
void land(const Copy& copy);

constexpr u32 turns_a_nap = 50000;  // some warp takes one
constexpr u32 longest_nap = 20000;  // turns

constexpr size_t stack_bytes = 128 << 10;
inline std::vector<char*> stacks;  // for good
inline jmp_buf scheduler;
inline Fiber* current;
inline Queue ready;
inline Queue polling;  // those that found nothing new: the others go first, mostly
inline std::vector<Copy> copies;
inline u64 clock;  // fibers that have gone on so far
inline u64 next_copy = ~u64(0);
inline u32 num_threads;  // of a CTA
inline void (*body)();

inline void leave() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

inline void yield() {
  polling.push_back(current);
  leave();
}

// `last` is what the last to come does for all.
template <class Last>
void meet(Meeting& meeting, int count, Last&& last) {
  if (++meeting.arrived == count) {
    last();
    meeting.arrived = 0;
    for (Fiber* fiber : meeting.waiting) ready.push_back(fiber);
    meeting.waiting.clear();
  } else {
    meeting.waiting.push_back(current);
    leave();
  }
}
inline void meet(Meeting& meeting, int count) {
  meet(meeting, count, [] {});
}

inline u32 lane() { return current->thread % 32; }

// A common operation of the warp: every lane brings some words, `last` turns the table into results.
template <class Last, class... Words>
const Table& together(Last&& last, Words... words) {
  Table& table = current->warp->tables[current->turn];
  current->turn ^= 1;
  u32* to = table.word[lane()];
  ((*to++ = words), ...);
  meet(current->warp->meeting, 32, [&] { last(table); });
  return table;
}

template <class T>
T exchange(T value, u32 source) {
  static_assert(sizeof(T) <= 8);
  u32 words[2] = {};
  std::memcpy(words, &value, sizeof(T));
  const Table& table = together([](Table&) {}, words[0], words[1]);
  std::memcpy(&value, table.word[source % 32], sizeof(T));
  return value;
}

inline void copy_later(const Copy& copy) {
  copies.push_back(copy);
  next_copy = min(next_copy, copy.due);
}

inline void land_copies() {
  next_copy = ~u64(0);
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].due <= clock) {
      land(copies[i]);
      copies[i] = copies.back();
      copies.pop_back();
    } else {
      next_copy = min(next_copy, copies[i++].due);
    }
  }
}

inline void start() {
  body();
  leave();  // for good: it waits for nobody
}

inline void go_on(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->context);
}

// Runs `work` in every thread; ends the process if some wait for what never comes, or leave before it.
inline void run(int num_ctas, int threads, void (*work)(), u32 seed = 1) {
  body = work;
  num_threads = threads;
  random_state = seed;
  clock = 0;
  std::vector<Fiber> fibers(num_ctas * threads);
  std::vector<Warp> warps(fibers.size() / 32);
  std::vector<std::vector<Meeting>> barriers(num_ctas, std::vector<Meeting>(16));
  while (stacks.size() < fibers.size()) stacks.push_back(new char[stack_bytes]);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = i % threads;
    fiber.block = i / threads;
    fiber.warp = &warps[i / 32];
    fiber.named_barriers = barriers[i / threads].data();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i];
    fiber.context.uc_stack.ss_size = stack_bytes - i % 64 * 832;  // on different lines of the processor's cache
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    ready.push_back(&fiber);
  }
  while (!ready.empty() || !polling.empty()) {
    if (++clock >= next_copy) land_copies();
    const bool polls = ready.empty() || (!polling.empty() && random(8) == 0);
    Fiber* fiber = (polls ? polling : ready).pop();
    if (random(turns_a_nap) == 0) fiber->warp->wakes_at = clock + random(longest_nap);
    if (fiber->warp->wakes_at <= clock) {
      go_on(fiber);
    } else {
      polling.push_back(fiber);
    }
  }
  bool stuck = !copies.empty();
  if (stuck) std::fprintf(stderr, "%zu copies have not landed\n", copies.size());
  const auto look_at = [&](const Meeting& meeting, const char* what, size_t i) {
    if (meeting.arrived == 0) return;
    stuck = true;
    std::fprintf(stderr, "%d threads wait at %s %zu\n", meeting.arrived, what, i);
  };
  for (size_t i = 0; i < warps.size(); ++i) look_at(warps[i].meeting, "the common operation of warp", i);
  for (size_t i = 0; i < 16 * barriers.size(); ++i) look_at(barriers[i / 16][i % 16], "barrier", i);
  if (stuck) std::abort();
}

}  // namespace simt

struct Index {
  u32 x;
};
#define threadIdx (Index{simt::current->thread})
#define blockIdx (Index{simt::current->block})
#define blockDim (Index{simt::num_threads})

inline void __syncthreads() { simt::meet(simt::current->named_barriers[0], simt::num_threads); }
inline void __syncwarp() { simt::meet(simt::current->warp->meeting, 32); }
template <class T>
T __shfl_xor_sync(u32, T v, int mask) { return simt::exchange(v, simt::lane() ^ mask); }
template <class T>
T __shfl_up_sync(u32, T v, int d) { return simt::exchange(v, simt::lane() < u32(d) ? simt::lane() : simt::lane() - d); }
template <class T>
T __shfl_down_sync(u32, T v, int d) {
  return simt::exchange(v, simt::lane() + d < 32 ? simt::lane() + d : simt::lane());
}
template <class T>
T __shfl_sync(u32, T v, int lane) { return simt::exchange(v, lane); }
inline u32 __ballot_sync(u32, bool v) {
  const simt::Table& table = simt::together([](simt::Table&) {}, u32(v));
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= table.word[i][0] << i;
  return bits;
}
inline bool __any_sync(u32 mask, bool v) { return __ballot_sync(mask, v) != 0; }
inline bool __all_sync(u32 mask, bool v) { return __ballot_sync(mask, v) == ~0u; }
