// What one CTA knows of itself: its threads' roles, its shared memory, and how it waits without ever hanging.
#pragma once
#include <config.h>

#include "ptx.cuh"

constexpr int num_consumer_warps = 8;
constexpr int num_consumers = num_consumer_warps * 32;
constexpr int max_slots = 16;
constexpr int max_rows = config::max_rows;
constexpr int tile_rows = 16;
constexpr float infinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr int red_stride = 20;  // floats between tokens of the reduction buffer: conflict-free for the mma layout

enum class WaitKind : u32 { slot_full = 1, slot_empty = 2, slot_landed = 3, grid_barrier = 4, kv_ready = 5, drain = 6 };

// Shared memory of fixed size; the activations and the ring follow it in dynamic shared memory.
struct Shared {
  float red[2][num_consumer_warps][max_rows * red_stride];
  float residual[config::residual_tiles][max_rows][tile_rows];  // fp32 rows of the hidden state that this CTA owns
  float rstd[max_rows];                                         // 1 / rms of each token's hidden state
  float best_logit[num_consumer_warps][max_rows];
  int best_id[num_consumer_warps][max_rows];
  float warp_sum[num_consumer_warps][max_rows];
  int token[max_rows];
  u64 full[max_slots];
  u64 empty[max_slots];
  u64 kv_ready;
  u32 flag;     // broadcast within the consumers
  u32 aborted;  // a wait has timed out: nobody waits any more, the kernel runs to its end
};

// Report the first wait of the grid that timed out, and let everybody run on.
__device__ __noinline__ void give_up(const StepArgs& args, Shared& shared, WaitKind kind, u32 expected, u32 seen) {
  if (atomicCAS(args.watchdog, 0u, static_cast<u32>(kind)) == 0u) {
    args.watchdog[1] = blockIdx.x;
    args.watchdog[2] = threadIdx.x / 32;
    args.watchdog[3] = expected;
    args.watchdog[4] = seen;
    __threadfence_system();
  }
  *static_cast<volatile u32*>(&shared.aborted) = 1;
}

// Time since the first call; the clock is read only by those who already wait.
__device__ __forceinline__ bool out_of_time(const StepArgs& args, u64& start) {
  const u64 now = globaltimer();
  if (start == 0) start = now;
  return now - start > args.wait_limit_ns;
}

__device__ __forceinline__ bool is_aborted(const Shared& shared) {
  return *static_cast<const volatile u32*>(&shared.aborted) != 0;
}

__device__ __noinline__ void wait_slowly(const StepArgs& args, Shared& shared, u64* bar, u32 parity, WaitKind kind) {
  u64 start = 0;
  for (u32 polls = 1; !mbarrier_test_wait(bar, parity); ++polls) {
    if (polls % 256 != 0) continue;
    if (is_aborted(shared)) return;
    if (out_of_time(args, start)) {
      return give_up(args, shared, kind, parity, static_cast<u32>(bar - shared.full));
    }
  }
}

struct Cta {
  const StepArgs& args;
  Shared& shared;
  u8* x;      // activations of the stage [rows][cols], 16 bit, fragment order; scratch of attention
  u8* slots;  // the ring [num_slots][config::slot_bytes]
  int thread;
  int warp;
  int lane;
  int idx;
  u32 barriers_passed = 0;

  __device__ Cta(const StepArgs& step_args, u8* dynamic, Shared& fixed)
      : args(step_args), shared(fixed), x(dynamic), slots(dynamic + step_args.x_bytes),
        thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32), idx(blockIdx.x) {}

  __device__ bool is_producer() const { return warp == num_consumer_warps; }
  __device__ void consumer_sync() const { bar_sync(1, num_consumers); }

  // Wait for a phase of a barrier in shared memory; after args.wait_limit_ns give up and let everybody run on.
  __device__ __forceinline__ void wait(u64* bar, u32 parity, WaitKind kind) const {
    if (!mbarrier_test_wait(bar, parity)) wait_slowly(args, shared, bar, parity, kind);
  }
};
