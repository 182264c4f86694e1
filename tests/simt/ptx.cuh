// CUDA's threads on one processor, as much of them as the sampler's code needs: kernel/ptx.cuh for a C++ compiler.
//
// Every thread of every CTA is a fiber; a fiber runs until it waits. Barriers, shuffles and votes wait for the warp or
// the CTA as they do on a GPU, so code that leaves a thread behind ends in `deadlock`.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __CUDA_ARCH__ 900

using std::max;
using std::min;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec16 {
  u32 w[4];
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct uint2 {
  u32 x, y;
};

namespace simt {

struct Meeting {  // of a number of fibers
  int arrived = 0;
  std::vector<struct Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  u64 value[32];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  u32 thread, block;
  Warp* warp;
  Meeting* named_barriers;  // of the CTA
};

inline ucontext_t scheduler;
inline Fiber* current;
inline std::deque<Fiber*> ready;

inline void leave() { swapcontext(&current->context, &scheduler); }

inline void yield() {
  ready.push_back(current);
  leave();
}

inline void meet(Meeting& meeting, int count) {
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    for (Fiber* fiber : meeting.waiting) ready.push_back(fiber);
    meeting.waiting.clear();
  } else {
    meeting.waiting.push_back(current);
    leave();
  }
}

template <class T>
T exchange(T value, u32 source) {
  static_assert(sizeof(T) <= 8);
  u64 bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  Warp& warp = *current->warp;
  warp.value[current->thread % 32] = bits;
  meet(warp.meeting, 32);
  std::memcpy(&value, &warp.value[source % 32], sizeof(T));
  meet(warp.meeting, 32);
  return value;
}

inline void (*body)();

inline void start() {
  body();
  leave();  // for good: it waits for nobody
}

// Runs `work` in every thread; ends the process if some wait for what never comes.
inline void run(int num_ctas, int threads, void (*work)()) {
  body = work;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::vector<Meeting>> barriers(num_ctas, std::vector<Meeting>(16));
  for (int i = 0; i < num_ctas * threads; ++i) {
    if (i % 32 == 0) warps.push_back(std::make_unique<Warp>());
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = i % threads;
    fiber->block = i / threads;
    fiber->warp = warps.back().get();
    fiber->named_barriers = barriers[i / threads].data();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, start, 0);
    ready.push_back(fiber.get());
    fibers.push_back(std::move(fiber));
  }
  while (!ready.empty()) {
    current = ready.front();
    ready.pop_front();
    swapcontext(&scheduler, &current->context);
  }
  bool stuck = false;
  for (auto& warp : warps) stuck |= warp->meeting.arrived != 0;
  for (auto& cta : barriers) {
    for (Meeting& meeting : cta) stuck |= meeting.arrived != 0;
  }
  if (stuck) {
    std::fprintf(stderr, "deadlock\n");
    std::abort();
  }
}

}  // namespace simt

struct Index {
  u32 x;
};
#define threadIdx (Index{simt::current->thread})
#define blockIdx (Index{simt::current->block})
constexpr Index blockDim = {256};

inline void __syncwarp() { simt::meet(simt::current->warp->meeting, 32); }
template <class T>
T __shfl_xor_sync(u32, T v, int mask) { return simt::exchange(v, simt::current->thread ^ mask); }
template <class T>
T __shfl_up_sync(u32, T v, int d) {
  const u32 lane = simt::current->thread % 32;
  return simt::exchange(v, lane < u32(d) ? lane : lane - d);
}
template <class T>
T __shfl_down_sync(u32, T v, int d) {
  const u32 lane = simt::current->thread % 32;
  return simt::exchange(v, lane + d < 32 ? lane + d : lane);
}
template <class T>
T __shfl_sync(u32, T v, int lane) { return simt::exchange(v, lane); }
inline u32 __ballot_sync(u32, bool v) {
  simt::Warp& warp = *simt::current->warp;
  warp.value[simt::current->thread % 32] = v;
  __syncwarp();
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= u32(warp.value[i]) << i;
  __syncwarp();
  return bits;
}
inline bool __any_sync(u32 mask, bool v) { return __ballot_sync(mask, v) != 0; }

template <class T>
T atomicAdd(T* p, T v) { return std::exchange(*p, *p + v); }
inline u32 atomicCAS(u32* p, u32 expected, u32 v) { return *p == expected ? std::exchange(*p, v) : *p; }
inline u64 __umul64hi(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
inline int __ffs(u32 v) { return __builtin_ffs(static_cast<int>(v)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline u32 __float_as_uint(float v) { return __builtin_bit_cast(u32, v); }
inline float __uint_as_float(u32 v) { return __builtin_bit_cast(float, v); }
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline void __nanosleep(u32) { simt::yield(); }
inline void __threadfence_system() {}
inline void __syncthreads() { simt::meet(simt::current->named_barriers[0], blockDim.x); }

inline u64 globaltimer() { return 0; }  // no wait is ever over
inline void bar_sync(int id, int threads) { simt::meet(simt::current->named_barriers[id], threads); }
inline void barrier_sync(int id, int threads) { bar_sync(id, threads); }
inline u32 shared_address(const void*) { return 0; }
inline bool mbarrier_test(u32, u32) { return true; }
inline bool mbarrier_try_wait(u32, u32) { return true; }
inline void red_release_gpu_add(u32* p, u32 v) { *p += v; }
inline u32 ld_acquire_gpu(const u32* p) {
  simt::yield();
  return *static_cast<const volatile u32*>(p);
}
inline void fence_proxy_async() {}

inline u32 ld_relaxed_gpu(const u32* p) { return *p; }
inline u32 ld_relaxed_sys(const u32* p) { return *p; }
inline void st_relaxed_sys(u32* p, u32 v) { *p = v; }
inline u64 ld_relaxed_gpu(const u64* p) { return *p; }
inline float ld_cg_f32(const float* p) { return *p; }
inline Vec16 ld_relaxed_gpu_b128(const void* p) {
  simt::yield();
  return *static_cast<const Vec16*>(p);
}
inline void st_relaxed_gpu_b128(void* p, const Vec16& v) { *static_cast<Vec16*>(p) = v; }
inline void st_relaxed_gpu_b64(void* p, u32 lo, u32 hi) { *static_cast<uint2*>(p) = {lo, hi}; }

inline float ex2(float v) { return std::exp2(v); }
// To the nearest, ties to even; only finite values.
inline u32 bf16_of(float v) { return (__float_as_uint(v) + 0x7fff + (__float_as_uint(v) >> 16 & 1)) >> 16; }
inline u32 cvt_bf16x2(float lo, float hi) { return bf16_of(lo) | bf16_of(hi) << 16; }
// Nobody here has narrow weights, or those of fp16.
inline u32 fma_bf16x2(u32, u32, u32) { std::abort(); }
inline u32 redux_max(u32) { std::abort(); }
inline u32 __byte_perm(u32, u32, u32) { std::abort(); }
inline u32 cvt_f16x2(float, float) { std::abort(); }
inline float cvt_f32_f16(u16) { std::abort(); }
