// What one CTA knows of itself: its threads' roles, its shared memory, and how it waits without ever hanging.
#pragma once
#include <config.h>

#include "ptx.cuh"

// Without bulk copies the producer takes so many registers that a call is cheaper than keeping all around it in place.
#if __CUDA_ARCH__ >= 900
#define INLINED_WITH_ROOM __forceinline__
#else
#define INLINED_WITH_ROOM __noinline__
#endif

constexpr int num_consumer_warps = 8;
constexpr int num_consumers = num_consumer_warps * 32;
constexpr int producing_lanes = config::arch >= 90 ? 1 : 32;  // of the producer's warp: one asks for bulk copies
constexpr int max_slots = 24;
constexpr int max_rows = config::max_rows;
constexpr int tile_rows = 16;
constexpr int tiles_finished = max_rows == 1 ? 2 : 1;  // at once: the finisher's lanes are two tokens, or two tiles
constexpr float infinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr int num_part_buffers = 2;
constexpr int part_arrivals = num_consumer_warps;  // that make a tile's parts ready; four warps or all share them
constexpr int part_stride = 20;    // floats between tokens of a part: conflict-free for the mma layout

enum class WaitKind : u32 {
  slot_full = 1,
  slot_empty = 2,
  slot_landed = 3,
  grid_barrier = 4,
  kv_ready = 5,
  drain = 6,
  packet = 7,
  part_ready = 8,
  part_free = 9
};

enum class NamedBarrier : int { consumers = 1, workers = 2 };  // workers: consumers and the finisher

// Shared memory of fixed size; the activations and the ring follow it in dynamic shared memory.
struct Shared {
  float part[num_part_buffers][num_consumer_warps][max_rows * part_stride];  // sums of a tile (finish.cuh)
  float row_scale[num_part_buffers][tile_rows];                             // of the same tile, if its format has them
  float residual[config::residual_tiles][max_rows][tile_rows];  // fp32 rows of the hidden state that this CTA owns
  alignas(16) float squares[max_rows][num_consumer_warps];  // of the travelling hidden state: a sum a warp's columns
  float2 rotation[config::num_ropes][max_rows][config::rotary_dim / 2 + 1];  // cos, sin of each row's position
  int token[max_rows];
  int own_page[max_rows];  // that gets the key and value of each row's token
  float choice_value[max_rows];  // this CTA's candidates for the next token
  int choice_id[max_rows];
  u64 full[max_slots];
  u64 empty[max_slots];
  u64 kv_ready;
  u64 part_ready[num_part_buffers];
  u64 part_free[num_part_buffers];
  u32 flag;     // broadcast within the consumers
  u32 stop;     // CTA 0: the host wants the launch to end
  u32 last;     // the launch ends with this token
  u32 leaves;   // the consumers leave the layers
  u32 barrier_phase;  // of the grid barrier; thread 0's
  u32 search_rounds;  // of all rows' filters in this launch
  u32 aborted;  // not 0: nobody waits any more; kind << 8 | warp of the wait that timed out, or `ends_early`
  int matrix;   // that the consumers are at
  int aborted_at;  // the matrix of the wait that timed out
  int moments[2];   // of the timeline: consumers, producer
  u32 waited[2][2]; // ns since the last moment, [track][ring, or packets and landing copies]
};

// `Shared::aborted` without a wait that has timed out: the host wants the launch to end, or it ends with this token. All
// CTAs still meet at the barriers.
constexpr u32 ends_early = 1;

// Counts the polls of one wait and ends it when its time is over. A wait that times out leaves a word in `aborted`,
// after which nobody in the CTA waits any more and the kernel runs to its end; no calls, so that a wait costs the
// code around it no registers.
struct Patience {
  u64 start = 0;
  u32 polls = 0;

  __device__ __forceinline__ bool ends(const StepArgs& args, Shared& shared, WaitKind kind) {
    if (++polls != 1 && polls % 8 != 0) return false;
    volatile u32* aborted = &shared.aborted;
    if (*aborted > (kind == WaitKind::grid_barrier ? ends_early : 0)) return true;
    if (polls % 16 != 0) return false;
    // Others may have left off with a token already: their packets have overtaken this wait.
    if (kind != WaitKind::grid_barrier && ld_relaxed_gpu(args.abandon) == args.epoch) {
      atomicCAS(&shared.aborted, 0u, ends_early);
      return true;
    }
    if (polls % 64 != 0 || !over(args)) return false;
    time_out(shared, kind);
    return true;
  }

  // The wait leaves its word.
  static __device__ __forceinline__ void time_out(Shared& shared, WaitKind kind) {
    *static_cast<volatile u32*>(&shared.aborted) = static_cast<u32>(kind) << 8 | threadIdx.x / 32;
    shared.aborted_at = *static_cast<volatile int*>(&shared.matrix);
  }

  __device__ __forceinline__ bool over(const StepArgs& args) {
    const u64 now = globaltimer();
    if (start == 0) start = now;
    return now - start > args.wait_limit_ns;
  }
};

struct Cta;

// Adds the time until its end to `Shared::waited`; nothing without a timeline.
struct Stopwatch {
  u32* sum = nullptr;
  u64 start = 0;

  __device__ __forceinline__ Stopwatch(const Cta& cta, WaitKind kind);
  __device__ __forceinline__ ~Stopwatch() {
    if constexpr (config::trace) {
      if (sum) *sum += static_cast<u32>(globaltimer() - start);
    }
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

  __device__ Cta(const StepArgs& step_args, u8* dynamic, Shared& fixed)
      : args(step_args), shared(fixed), x(dynamic), slots(dynamic + step_args.x_bytes),
        thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32), idx(blockIdx.x) {}

  __device__ bool is_finisher() const { return warp == num_consumer_warps; }
  __device__ bool is_producer() const { return warp == num_consumer_warps + 1; }
  __device__ bool produces() const { return is_producer() && lane < producing_lanes; }
  __device__ void consumer_sync() const { bar_sync(static_cast<int>(NamedBarrier::consumers), num_consumers); }
  __device__ void worker_sync() const { barrier_sync(static_cast<int>(NamedBarrier::workers), num_consumers + 32); }

  __device__ bool aborted() const { return *static_cast<volatile u32*>(&shared.aborted) != 0; }
  __device__ bool timed_out() const { return *static_cast<volatile u32*>(&shared.aborted) > ends_early; }

  // Hides from the compiler that these never change: what a stage derives from them is computed there instead of being
  // kept in registers from one layer to the next.
  __device__ __forceinline__ void begin_stage() { asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(idx)); }

  // Wait for a phase of a barrier in shared memory; after args.wait_limit_ns give up and let everybody run on. Returns
  // whether the phase is over.
  __device__ __forceinline__ bool wait(u32 bar, u32 parity, WaitKind kind) const {
    const Stopwatch stopwatch(*this, kind);
    if (mbarrier_test(bar, parity)) return true;
    if (aborted()) return false;  // before a sleep in hardware, which may be long
    Patience patience;
    while (!mbarrier_try_wait(bar, parity)) {
      if (patience.ends(args, shared, kind)) return false;
    }
    return true;
  }

  // The others in the CTA leave off where they are.
  __device__ __forceinline__ void end_early() const { atomicCAS(&shared.aborted, 0u, ends_early); }

  __device__ bool is_traced() const { return thread == 0 || (is_producer() && lane == 0); }

  // The end of a slice of this CTA's timeline (codegen/instruments.py), with the time waited in it.
  __device__ __forceinline__ void trace(Moment moment, int layer = 0) const {
    if constexpr (config::trace) {
      const int track = is_producer();
      if (!is_traced() || shared.moments[track] == config::trace_moments) return;
      const u64 at = (u64(idx) * 2 + track) * config::trace_moments + shared.moments[track]++;
      args.trace[2 * at] = globaltimer() << 16 | u64(layer & 255) << 8 | static_cast<u64>(moment);
      args.trace[2 * at + 1] = u64(shared.waited[track][1]) << 32 | shared.waited[track][0];
      shared.waited[track][0] = shared.waited[track][1] = 0;
    }
  }

  // Tests sleep at hand-offs, as the seed, the CTA, the warp and the place decide: no result may depend on it.
  __device__ __forceinline__ void delay(u32 place) const {
    if constexpr (config::delay_ns > 0) {
      u32 h = args.delay_seed + (idx * 16 + warp) * 0x9e3779b9u + place * 0x85ebca6bu;
      h = (h ^ h >> 16) * 0x7feb352du;
      h = (h ^ h >> 15) * 0x846ca68bu;
      h ^= h >> 16;
      if (h % 4 == 0) __nanosleep(h / 4 % config::delay_ns);
    }
  }

  // Tests lose the packets of one matrix and CTA.
  __device__ __forceinline__ bool drops_packets(int matrix) const {
    if constexpr (!config::faults) return false;
    return args.drop_matrix == matrix + 1 && args.drop_cta == idx;
  }

  // At the kernel's end: of all waits of the grid that timed out one of the earliest stage goes to the host (watchdog.py).
  __device__ void report() const {
    const u32 word = *static_cast<volatile u32*>(&shared.aborted);
    if (word < 256) return;
    const u32 found = (0x3fffu - shared.aborted_at) << 18 | (word >> 8) << 14 | (word & 15) << 10 | idx;
    u32 known = 0;
    while (known < found) {
      const u32 seen = atomicCAS(args.watchdog, known, found);
      if (seen == known) break;
      known = seen;
    }
    __threadfence_system();
  }
};

__device__ __forceinline__ Stopwatch::Stopwatch(const Cta& cta, WaitKind kind) {
  if constexpr (config::trace) {
    if (!cta.is_traced()) return;
    sum = &cta.shared.waited[cta.is_producer()][kind == WaitKind::packet || kind == WaitKind::slot_landed];
    start = globaltimer();
  }
}

// Tests fill the shared memory with NaN: what is read has been written in this launch.
__device__ __forceinline__ void poison_shared(const Cta& cta) {
  if constexpr (config::poison) {
    u32* fixed = reinterpret_cast<u32*>(&cta.shared);
    u32* dynamic = reinterpret_cast<u32*>(cta.x);
    const u32 dynamic_bytes = cta.args.x_bytes + cta.args.num_slots * config::slot_bytes;
    for (u32 i = cta.thread; i < sizeof(Shared) / 4; i += blockDim.x) fixed[i] = ~0u;
    for (u32 i = cta.thread; i < dynamic_bytes / 4; i += blockDim.x) dynamic[i] = ~0u;
    __syncthreads();
  }
}
