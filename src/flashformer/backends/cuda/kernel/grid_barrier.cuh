// All CTAs have finished a stage: one counter in global memory that only grows.
//
// Release: everything that this CTA's consumers wrote before is visible to every CTA that has passed.
// Acquire: this CTA's consumers see it. The counter starts at args.barrier_start and wraps freely.
#pragma once
#include "cta.cuh"

__device__ __forceinline__ void grid_barrier(Cta& cta) {
  ++cta.barriers_passed;
  cta.delay(cta.barriers_passed);
  cta.consumer_sync();
  if (cta.thread == 0) {
    red_release_gpu_add(cta.args.barrier, 1);
    const u32 target = cta.args.barrier_start + cta.barriers_passed * config::num_ctas;
    Patience patience;
    while (static_cast<int>(ld_acquire_gpu(cta.args.barrier) - target) < 0) {
      if (patience.ends(cta.args, cta.shared, WaitKind::grid_barrier)) break;
    }
  }
  cta.consumer_sync();
}
