// All CTAs have finished a stage: one counter in global memory that only grows.
//
// Release: everything that this CTA's consumers wrote before is visible to every CTA that has passed.
// Acquire: this CTA's consumers see it. The counter starts at args.barrier_start and wraps freely.
#pragma once
#include "cta.cuh"

__device__ __noinline__ void grid_barrier_wait(const StepArgs& args, Shared& shared, u32 target) {
  u64 start = 0;
  for (u32 polls = 1;; ++polls) {
    const u32 seen = ld_acquire_gpu(args.barrier);
    if (static_cast<int>(seen - target) >= 0) return;
    if (polls % 64 != 0) continue;
    if (is_aborted(shared)) return;
    if (out_of_time(args, start)) return give_up(args, shared, WaitKind::grid_barrier, target, seen);
  }
}

__device__ __forceinline__ void grid_barrier(Cta& cta) {
  ++cta.barriers_passed;
  cta.consumer_sync();
  if (cta.thread == 0) {
    red_release_gpu_add(cta.args.barrier, 1);
    grid_barrier_wait(cta.args, cta.shared, cta.args.barrier_start + cta.barriers_passed * config::num_ctas);
  }
  cta.consumer_sync();
}
