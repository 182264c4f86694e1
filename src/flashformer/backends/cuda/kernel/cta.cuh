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

enum class WaitKind : u32 { slot_full = 1, slot_empty = 2, slot_landed = 3, grid_barrier = 4, kv_ready = 5, drain = 6, packet = 7 };

// Shared memory of fixed size; the activations and the ring follow it in dynamic shared memory.
struct Shared {
  float red[2][num_consumer_warps][max_rows * red_stride];
  float residual[config::residual_tiles][max_rows][tile_rows];  // fp32 rows of the hidden state that this CTA owns
  float norm[2][config::residual_tiles * tile_rows];  // weights of the norms behind those rows: after o_proj, after down
  float2 rotation[config::num_ropes][max_rows][config::rotary_dim / 2 + 1];  // cos, sin of each row's position
  float rstd[max_rows];                                         // 1 / rms of each token's hidden state
  float best_logit[num_consumer_warps][max_rows / 2][32];
  int best_id[num_consumer_warps][max_rows / 2][32];
  float warp_sum[num_consumer_warps][max_rows];
  int token[max_rows];
  u64 full[max_slots];
  u64 empty[max_slots];
  u64 kv_ready;
  u32 stalled;  // the ring is full
  u32 filled;   // fills issued so far
  u32 flag;     // broadcast within the consumers
  u32 aborted;  // not 0: nobody waits any more; kind << 8 | warp of the wait that timed out
};

// Counts the polls of one wait and ends it when its time is over. A wait that times out leaves a word in `aborted`,
// after which nobody in the CTA waits any more and the kernel runs to its end; no calls, so that a wait costs the
// code around it no registers.
struct Patience {
  u64 start = 0;
  u32 polls = 0;

  __device__ __forceinline__ bool ends(const StepArgs& args, Shared& shared, WaitKind kind) {
    if (++polls % 64 != 0) return false;
    volatile u32* aborted = &shared.aborted;
    if (*aborted != 0) return true;
    const u64 now = globaltimer();
    if (start == 0) start = now;
    if (now - start <= args.wait_limit_ns) return false;
    *aborted = static_cast<u32>(kind) << 8 | threadIdx.x / 32;
    return true;
  }
};

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
  int moments = 0;

  __device__ Cta(const StepArgs& step_args, u8* dynamic, Shared& fixed)
      : args(step_args), shared(fixed), x(dynamic), slots(dynamic + step_args.x_bytes),
        thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32), idx(blockIdx.x) {}

  __device__ bool is_producer() const { return warp == num_consumer_warps; }
  __device__ bool is_prefetcher() const { return warp == num_consumer_warps + 1; }
  __device__ void consumer_sync() const { bar_sync(1, num_consumers); }

  __device__ bool aborted() const { return *static_cast<volatile u32*>(&shared.aborted) != 0; }

  // Wait for a phase of a barrier in shared memory; after args.wait_limit_ns give up and let everybody run on.
  __device__ __forceinline__ void wait(u64* bar, u32 parity, WaitKind kind) const {
    Patience patience;
    while (!mbarrier_test_wait(bar, parity)) {
      if (patience.ends(args, shared, kind)) return;
    }
  }

  // A moment of this CTA's timeline (profile.py knows the order); compiled out unless the plan asks for it.
  __device__ __forceinline__ void trace() {
    if constexpr (config::trace) {
      if (thread == 0 && moments < config::trace_moments) {
        args.trace[u64(idx) * config::trace_moments + moments++] = globaltimer();
      }
    }
  }

  // At the kernel's end: the first wait of the grid that timed out goes to the host.
  __device__ void report() const {
    const u32 word = *static_cast<volatile u32*>(&shared.aborted);
    if (word < 256 || atomicCAS(args.watchdog, 0u, word >> 8) != 0) return;
    args.watchdog[1] = idx;
    args.watchdog[2] = word & 255;
    __threadfence_system();
  }
};
