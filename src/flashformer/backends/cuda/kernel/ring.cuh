// The ring of slots in shared memory through which all weights, keys and values stream.
//
// One warp fills, eight warps read. `RingPosition` is a slot and the parity of its barriers; both sides walk the
// same sequence of fills, which is never interrupted at a stage, layer or token. Two limits: a slot is refilled
// only when all readers have released it, and few fills are on their way at any time (queues in the memory system make
// every hand-off slower: docs/cuda-kernel.md).
#pragma once
#include "cta.cuh"

struct RingPosition {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(int num_slots, int n = 1) {
    slot += n;
    if (slot >= num_slots) {
      slot -= num_slots;
      parity ^= 1;
    }
  }
};

// Used by the producer warp, all lanes together.
struct RingWriter {
  const Cta& cta;
  RingPosition next;    // to be filled
  RingPosition landed;  // the oldest fill that may still be on its way
  int in_flight = 0;

  __device__ explicit RingWriter(const Cta& c) : cta(c) { next.parity = 1; }

  __device__ void fill(const u8* source, u32 bytes) {
    Shared& shared = cta.shared;
    if (__any_sync(~0u, cta.aborted())) return;  // or every fill would wait in vain
    while (in_flight >= most_in_flight()) land(WaitKind::slot_landed);
    cta.wait(&shared.empty[next.slot], next.parity, WaitKind::slot_empty);
    if (__any_sync(~0u, cta.aborted())) return;  // nobody reads on
    u8* slot = cta.slots + static_cast<u64>(next.slot) * config::slot_bytes;
    cta.delay(next.slot);
    copy(slot, source, bytes, &shared.full[next.slot]);
    next.advance(cta.args.num_slots);
    ++in_flight;
  }

  // Fewer while half of the slots wait to be read: hand-offs then matter more than copies.
  __device__ __forceinline__ int most_in_flight() const {
    RingPosition ahead = next;
    ahead.advance(cta.args.num_slots, cta.args.num_slots / 2);
    const bool is_free = mbarrier_test(&cta.shared.empty[ahead.slot], ahead.parity);
    return __any_sync(~0u, is_free) ? cta.args.in_flight : cta.args.full_in_flight;
  }

#if __CUDA_ARCH__ >= 900
  __device__ void copy(u8* slot, const u8* source, u32 bytes, u64* full) {
    if (cta.lane != 0) return;
    mbarrier_arrive_expect_tx(full, bytes);
    cp_async_bulk(slot, source, bytes, full);
  }
#else
  __device__ void copy(u8* slot, const u8* source, u32 bytes, u64* full) {
    for (u32 at = cta.lane * 16; at < bytes; at += 32 * 16) cp_async_16(slot + at, source + at);
    cp_async_mbarrier_arrive_noinc(full);
  }
#endif

  __device__ __forceinline__ void trace(Moment moment, int layer) const { cta.trace(moment, layer); }

  // The oldest copy on its way has landed. Waits when nobody else does any more: a copy must not outlive the CTA.
  __device__ void land(WaitKind kind) {
    Patience patience;
    while (!mbarrier_try_wait(&cta.shared.full[landed.slot], landed.parity)) {
      if (++patience.polls % 64 == 0 && patience.over(cta.args)) {
        *static_cast<volatile u32*>(&cta.shared.aborted) = static_cast<u32>(kind) << 8 | cta.warp;
        cta.shared.aborted_at = *static_cast<volatile int*>(&cta.shared.matrix);
        break;
      }
    }
    landed.advance(cta.args.num_slots);
    --in_flight;
  }

  __device__ void drain() {
    while (in_flight > 0) land(WaitKind::drain);
  }
};

// Used by every consumer warp for itself. A slot is read by some warps or by all of them; either way its `empty` counts
// as many arrivals as there are consumer warps.
struct RingReader {
  const Cta& cta;
  RingPosition next;

  __device__ explicit RingReader(const Cta& c) : cta(c) {}

  // A wait has ended without its slot, so there is nothing to wait for any more. A third parity says so, for registers
  // are short; it stays beyond 1 as the position advances.
  __device__ __forceinline__ bool is_lost() const { return next.parity > 1; }

  __device__ __forceinline__ const u8* wait() {
    if (!is_lost() && !cta.wait(&cta.shared.full[next.slot], next.parity, WaitKind::slot_full)) next.parity = 2;
    return cta.slots + static_cast<u64>(next.slot) * config::slot_bytes;
  }

  // This warp, one of num_consumer_warps / count readers, is done with the slot.
  template <int count>
  __device__ __forceinline__ void release() {
    __syncwarp();
    mbarrier_arrive_warp<count>(&cta.shared.empty[next.slot], cta.lane);
  }

  // On to another slot; those between are read by other warps.
  __device__ __forceinline__ void skip(int num_slots) { next.advance(cta.args.num_slots, num_slots); }
};

__device__ __forceinline__ void ring_init(const Cta& cta) {
  poison_shared(cta);
  if (cta.thread == 0) {
    for (int i = 0; i < cta.args.num_slots; ++i) {
      mbarrier_init(&cta.shared.full[i], config::arch >= 90 ? 1 : 32);
      mbarrier_init(&cta.shared.empty[i], num_consumer_warps * arriving_lanes);
    }
    mbarrier_init(&cta.shared.kv_ready, 1);
    for (u64& ready : cta.shared.part_ready) mbarrier_init(&ready, part_arrivals * arriving_lanes);
    for (u64& free : cta.shared.part_free) mbarrier_init(&free, arriving_lanes);
    cta.shared.aborted = 0;
    cta.shared.last = 0;
    cta.shared.search_rounds = 0;
    cta.shared.matrix = 0;
    for (int track = 0; track < 2; ++track) {
      cta.shared.moments[track] = 0;
      cta.shared.waited[track][0] = cta.shared.waited[track][1] = 0;
    }
    fence_mbarrier_init();
  }
  __syncthreads();
}
