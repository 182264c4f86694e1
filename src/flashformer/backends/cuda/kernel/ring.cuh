// The ring of slots in shared memory through which all weights, keys and values stream.
//
// One lane fills, eight warps read. `RingPosition` is a slot and the parity of its barriers; both sides walk the
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

// Used by the producing lanes, each for itself. A copy costs its lane a few hundred clocks, and memory delivers a slot to an
// SM in 900: so barriers are known by their addresses, and nothing is asked twice.
struct RingWriter {
  const Cta& cta;
  u32 full, empty, slots;  // addresses of those of slot 0
  RingPosition next;       // to be filled
  RingPosition ahead;      // half a ring further on
  RingPosition landed;     // the oldest fill that may still be on its way
  int in_flight = 0;
  bool lost = false;       // a wait has ended without its slot: nobody reads on

  __device__ explicit RingWriter(const Cta& c)
      : cta(c), full(shared_address(c.shared.full)), empty(shared_address(c.shared.empty)), slots(shared_address(c.slots)) {
    next.parity = ahead.parity = 1;
    ahead.advance(cta.args.num_slots, cta.args.num_slots / 2);
  }

  __device__ __forceinline__ void fill(const u8* source, u32 bytes) {
    if (lost) return;
    // Fewer while half of the slots wait to be read: hand-offs then matter more than copies.
    const bool half_free = mbarrier_test(empty + 8 * ahead.slot, ahead.parity);
    const int most = half_free ? cta.args.in_flight : cta.args.full_in_flight;
    while (in_flight >= most) land(WaitKind::slot_landed);
    lost = !cta.wait(empty + 8 * next.slot, next.parity, WaitKind::slot_empty);
    if (lost) return;
    cta.delay(next.slot);
    copy(slots + next.slot * config::slot_bytes, source, bytes, full + 8 * next.slot);
    next.advance(cta.args.num_slots);
    ahead.advance(cta.args.num_slots);
    ++in_flight;
  }

#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ void copy(u32 slot, const u8* source, u32 bytes, u32 bar) {
    mbarrier_arrive_expect_tx(bar, bytes);
    cp_async_bulk(slot, source, bytes, bar);
  }
#else
  __device__ __forceinline__ void copy(u32 slot, const u8* source, u32 bytes, u32 bar) {
    for (u32 at = cta.lane * 16; at < bytes; at += 32 * 16) cp_async_16(slot + at, source + at);
    cp_async_mbarrier_arrive_noinc(bar);
  }
#endif

  __device__ __forceinline__ void trace(Moment moment, int layer) const { cta.trace(moment, layer); }

  // The oldest copy on its way has landed. Waits when nobody else does any more: a copy must not outlive the CTA.
  __device__ __forceinline__ void land(WaitKind kind) {
    Patience patience;
    while (!mbarrier_try_wait(full + 8 * landed.slot, landed.parity)) {
      if (++patience.polls % 64 == 0 && patience.over(cta.args)) {
        Patience::time_out(cta.shared, kind);
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
  __device__ __forceinline__ void lose() { next.parity = 2; }

  __device__ __forceinline__ const u8* wait() {
    const u32 bar = shared_address(&cta.shared.full[next.slot]);
    if (!is_lost() && !agreed(cta.wait(bar, next.parity, WaitKind::slot_full))) lose();
    return cta.slots + static_cast<u64>(next.slot) * config::slot_bytes;
  }

  // This warp, one of num_consumer_warps / count readers, is done with the slot.
  template <int count>
  __device__ __forceinline__ void release() {
    __syncwarp();
    mbarrier_arrive_warp<count>(shared_address(&cta.shared.empty[next.slot]), cta.lane);
  }

  // On to another slot; those between are read by other warps.
  __device__ __forceinline__ void skip(int num_slots) { next.advance(cta.args.num_slots, num_slots); }
};

__device__ __forceinline__ void ring_init(const Cta& cta) {
  poison_shared(cta);
  if (cta.thread == 0) {
    for (int i = 0; i < cta.args.num_slots; ++i) {
      mbarrier_init(shared_address(&cta.shared.full[i]), config::arch >= 90 ? 1 : 32);
      mbarrier_init(shared_address(&cta.shared.empty[i]), num_consumer_warps * arriving_lanes);
    }
    mbarrier_init(shared_address(&cta.shared.kv_ready), 1);
    for (u64& ready : cta.shared.part_ready) mbarrier_init(shared_address(&ready), part_arrivals * arriving_lanes);
    for (u64& free : cta.shared.part_free) mbarrier_init(shared_address(&free), arriving_lanes);
    cta.shared.aborted = 0;
    cta.shared.last = 0;
    cta.shared.leaves = 0;
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
