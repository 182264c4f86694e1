// The decoder with one of its ideas taken out, to see what the idea is worth; everything else is decode.cu itself.
// ablation.py defines which. For one token a step.
#include "multiply.cuh"

#if defined(ABLATE_TENSOR_CORES)
// Products by FFMA: weights and activations are widened to fp32 in the order in which they lie.
__device__ __forceinline__ void widen(u32 pair, float& lo, float& hi) {
  lo = __uint_as_float(pair << 16);
  hi = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ float dot(u32 weights, float lo, float hi, float sum) {
  float w_lo, w_hi;
  widen(weights, w_lo, w_hi);
  return fmaf(w_hi, hi, fmaf(w_lo, lo, sum));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

template <class F, int count, int last_blocks, class X>
__device__ __forceinline__ void ffma_runs(const Cta& cta, Sums<F>& sums, const u8* slot, const Operand<F, X>& x) {
  static_assert(max_rows == 1 && F::bits == 16 && !config::weights_f16);
  const u8* token = x.x - cta.lane / 4 * X::stride;  // the one there is, for all lanes
  float low = 0, high = 0;                           // row lane / 4, and + 8
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const Vec16 a = *reinterpret_cast<const Vec16*>(slot + i * F::run_bytes + cta.lane * 16);
    const uint2 b = *reinterpret_cast<const uint2*>(token + i * (F::run_cols * 2));
    float x0, x1, x2, x3;
    widen(b.x, x0, x1);
    widen(b.y, x2, x3);
    low = dot(a.w[2], x2, x3, dot(a.w[0], x0, x1, low));
    high = dot(a.w[3], x2, x3, dot(a.w[1], x0, x1, high));
  }
  sums.chain[0][0] += quad_sum(low);
  sums.chain[0][2] += quad_sum(high);
}
#define multiply_runs ffma_runs
#endif

#include "attention.cuh"
#include "hidden.cuh"
#include "sample.cuh"

#if defined(ABLATE_RING)
// The ring stops at a stage's end: nothing of the next stage is read before the consumers have used up this one.
__device__ __forceinline__ void wait_until_empty(const RingWriter& ring) {
  RingPosition slot = ring.next;
  for (int i = 0; i < ring.cta.args.num_slots; ++i) {
    ring.cta.wait(ring.empty + 8 * slot.slot, slot.parity, WaitKind::slot_empty);
    slot.advance(ring.cta.args.num_slots);
  }
}
template <Kind kind>
__device__ __forceinline__ void stream_and_stop(RingWriter& ring, int layer) {
  stream_tiles<kind>(ring, layer);
  wait_until_empty(ring);
}
__device__ __forceinline__ void stream_past_and_stop(RingWriter& ring, int layer, int step) {
  stream_past(ring, layer, step);
  wait_until_empty(ring);
}
#define stream_tiles stream_and_stop
#define stream_past stream_past_and_stop
#endif

#define decode plain_decode
#include "decode.cu"
#undef decode

#if defined(ABLATE_PACKETS)
// All CTAs meet after every stage. Values still travel in packets, which have all arrived by then.
struct MeetingConsumer : Consumer {
  using Consumer::Consumer;

  __device__ __forceinline__ void meet() {
    cta.worker_sync();  // the finisher has sent all
    grid_barrier(cta);
  }
  template <Kind kind>
  __device__ __forceinline__ void stage(int layer, const u8* input, u32 input_tag) {
    cta.begin_stage();
    multiply<kind>(layer, input, input_tag);
    meet();
  }
  __device__ __forceinline__ void run() {
    start_barriers(cta);
    if (cta.thread < cta.args.num_rows) cta.shared.token[cta.thread] = cta.args.tokens[cta.thread];
    cta.consumer_sync();
#pragma unroll 1
    for (int step = 0; step < cta.args.num_steps; ++step) {
      load_positions(cta, step);
      embed(cta);
      cta.worker_sync();
#pragma unroll 1
      for (int layer = 0; layer < config::num_layers; ++layer, tag ^= 1) {
        stage<Kind::qkv>(layer, exchange.hidden_attention, tag ^ 1);
        attention(cta, ring, exchange, layer, step, tag);
        grid_barrier(cta);
        stage<Kind::o_proj>(layer, exchange.attention, tag);
        stage<Kind::gate_up>(layer, exchange.hidden_mlp, tag);
        stage<Kind::down>(layer, exchange.mlp, tag);
      }
      if (cta.idx == 0 && cta.thread == 0) cta.shared.stop = ld_relaxed_sys(cta.args.stop);
      multiply<Kind::lm_head>(config::num_layers, exchange.hidden_attention, tag ^ 1);
      cta.worker_sync();
      publish(cta, exchange, step);
      grid_barrier(cta);
      pick(cta, exchange, step);
      if (cta.shared.last != 0) break;
      if (cta.thread == 0) mbarrier_arrive(shared_address(&cta.shared.kv_ready));
    }
    cta.worker_sync();
    end_early();
  }
};

struct MeetingFinisher : Finisher {
  using Finisher::Finisher;

  template <Kind kind>
  __device__ __forceinline__ void stage(int layer) {
    finish<kind>(layer);
    cta.worker_sync();
  }
  __device__ __forceinline__ void run() {
    for (;;) {
      cta.worker_sync();
      if (cta.shared.last) return;
#pragma unroll 1
      for (int layer = 0; layer < config::num_layers; ++layer, next_layer()) {
        stage<Kind::qkv>(layer);
        stage<Kind::o_proj>(layer);
        stage<Kind::gate_up>(layer);
        stage<Kind::down>(layer);
      }
      best.clear();
      finish<Kind::lm_head>(config::num_layers);
      best.choose(cta);
      cta.worker_sync();
    }
  }
};
#else
using MeetingConsumer = Consumer;
using MeetingFinisher = Finisher;
#endif

extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1) decode(const __grid_constant__ StepArgs args) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  run_role<MeetingConsumer, MeetingFinisher>(cta);
}
