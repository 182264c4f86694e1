// The stream limit: the decoder's ring over `bytes` of memory, with consumers that compute nothing and never meet.
#include "ring.cuh"

extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1)
    stream(const __grid_constant__ StepArgs args, u64 bytes) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  ring_init(cta);
  const u64 num_slots = bytes / config::slot_bytes;
  const u64 begin = num_slots * cta.idx / config::num_ctas;
  const u64 end = num_slots * (cta.idx + 1) / config::num_ctas;
  if (cta.is_producer()) {
    if (!cta.produces()) return;
    RingWriter ring(cta);
    for (u64 i = begin; i < end; ++i) ring.fill(args.image + i * config::slot_bytes, config::slot_bytes);
    ring.drain();
  } else if (!cta.is_finisher()) {
    RingReader ring(cta);
    for (u64 i = begin; i < end; ++i) {
      ring.wait();
      ring.release<1>();
      ring.skip(1);
    }
  }
}
