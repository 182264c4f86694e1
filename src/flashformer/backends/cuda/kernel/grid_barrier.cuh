// All CTAs have finished a stage: one counter in global memory.
//
// Release: everything that this CTA's consumers wrote before is visible to every CTA that has passed.
// Acquire: this CTA's consumers see it. The arrivals of all CTAs add up to the top bit, so a barrier flips it and leaves
// the rest as it was: nothing to count or reset between launches.
#pragma once
#include "cta.cuh"

constexpr u32 barrier_bit = 1u << 31;

// Before the CTA's first barrier, which nobody can pass before that.
__device__ __forceinline__ void start_barriers(const Cta& cta) {
  if (cta.thread == 0) cta.shared.barrier_phase = ld_acquire_gpu(cta.args.barrier) & barrier_bit;
}

__device__ __forceinline__ void grid_barrier(const Cta& cta) {
  cta.delay(cta.shared.barrier_phase ^ cta.shared.search_rounds);
  cta.consumer_sync();
  if (cta.thread == 0) {
    const u32 phase = cta.shared.barrier_phase ^ barrier_bit;
    cta.shared.barrier_phase = phase;
    red_release_gpu_add(cta.args.barrier, cta.idx == 0 ? barrier_bit - (config::num_ctas - 1) : 1);
    Patience patience;
    while ((ld_acquire_gpu(cta.args.barrier) & barrier_bit) != phase) {
      if (patience.ends(cta.args, cta.shared, WaitKind::grid_barrier)) break;
    }
  }
  cta.consumer_sync();
}
