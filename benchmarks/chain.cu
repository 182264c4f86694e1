// The decoder's own stages as separate kernels, one launch each: what is left when nothing but the whole-model kernel is
// taken away. The weights, the ring, the products and the sums are those of decode.cu, and so are the bits.
//
// A launch may begin while the one before ends (programmatic dependent launch): its producer then streams weights already,
// the others wait. The residual, which lives in shared memory there, goes through global memory here.
#include "decode.cu"

// [num_ctas]: what each CTA keeps from one launch to the next
struct Kept {
  float residual[config::residual_tiles][max_rows][tile_rows];
};

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The tag of a layer's packets; the head counts as the layer after the last.
__device__ __forceinline__ u32 tag_of(int layer, int step) { return (step * config::num_layers + layer) & 1; }

__device__ __forceinline__ void copy_floats(const Cta& cta, float* to, const float* from, int num) {
  for (int i = cta.thread; i < num; i += num_consumers) to[i] = from[i];
  cta.consumer_sync();
}

// Where a matrix's input comes from, and whether the layer before wrote it.
template <Kind kind>
__device__ __forceinline__ const u8* input_of(const Exchange& exchange) {
  if constexpr (kind == Kind::o_proj) return exchange.attention;
  if constexpr (kind == Kind::gate_up) return exchange.hidden_mlp;
  if constexpr (kind == Kind::down) return exchange.mlp;
  return exchange.hidden_attention;
}

// The token that the launch before has found candidates for, or the first one, and its embedding.
__device__ __forceinline__ void begin_token(const Cta& cta, const Exchange& exchange, int step) {
  if (step > 0) {
    pick(cta, exchange, step - 1);
  } else if (cta.thread < cta.args.num_rows) {
    cta.shared.token[cta.thread] = cta.args.tokens[cta.thread];
  }
  cta.consumer_sync();
  embed(cta);
}

template <Kind kind>
__device__ __forceinline__ void consume(Cta& cta, float* kept, int layer, int step) {
  constexpr bool owns = kind == Kind::o_proj || kind == Kind::down;
  constexpr bool reads_last_layer = kind == Kind::qkv || kind == Kind::lm_head;
  constexpr int residual_floats = sizeof(Kept) / sizeof(float);
  float* residual = &cta.shared.residual[0][0][0];
  Consumer consumer(cta);
  consumer.tag = tag_of(layer, step);
  const bool embeds = is_embedded<kind>(layer);
  if (embeds) begin_token(cta, consumer.exchange, step);
  if (owns) copy_floats(cta, residual, kept, residual_floats);
  cta.worker_sync();  // the finisher may use the residual
  consumer.template multiply<kind>(layer, input_of<kind>(consumer.exchange), consumer.tag ^ reads_last_layer);
  cta.worker_sync();  // the finisher is done
  if (owns || embeds) copy_floats(cta, kept, residual, residual_floats);
  if (kind == Kind::lm_head) publish(cta, consumer.exchange, step);
}

template <Kind kind>
__device__ __forceinline__ void finish(Cta& cta, int layer, int step) {
  Finisher finisher(cta);
  finisher.tag = tag_of(layer, step);
  finisher.epoch = epoch_of(cta, step, layer);
  if (kind == Kind::lm_head) finisher.best.clear();
  cta.worker_sync();
  finisher.template finish<kind>(layer);
  if (kind == Kind::lm_head) finisher.best.choose(cta);
  cta.worker_sync();
}

template <Kind kind>
__device__ __forceinline__ void run_matrix(const StepArgs& args, Kept* kept, int layer, int step) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  ring_init(cta);
  launch_dependents();
  if (cta.is_producer()) {
    if (!cta.produces()) return;
    RingWriter ring(cta);
    stream_tiles<kind>(ring, layer);
    return ring.drain();
  }
  wait_for_launch_before();
  if (cta.is_finisher()) return finish<kind>(cta, layer, step);
  consume<kind>(cta, &kept[cta.idx].residual[0][0][0], layer, step);
  if (cta.thread == 0) cta.report();
}

#define CHAIN_MATRIX(kind)                                                                   \
  extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1)                        \
      kind(const __grid_constant__ StepArgs args, Kept* kept, int layer, int step) {         \
    run_matrix<Kind::kind>(args, kept, layer, step);                                         \
  }
CHAIN_MATRIX(qkv)
CHAIN_MATRIX(o_proj)
CHAIN_MATRIX(gate_up)
CHAIN_MATRIX(down)
CHAIN_MATRIX(lm_head)

extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1)
    attend(const __grid_constant__ StepArgs args, Kept*, int layer, int step) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  ring_init(cta);
  launch_dependents();
  wait_for_launch_before();  // the producer as well: it reads what earlier tokens have left
  if (cta.is_producer()) {
    if (!cta.produces()) return;
    RingWriter ring(cta);
    stream_past(ring, layer, step);
    return ring.drain();
  }
  if (cta.is_finisher()) return;
  Consumer consumer(cta);
  load_positions(cta, step);
  cta.consumer_sync();
  attention(cta, consumer.ring, consumer.exchange, layer, step, tag_of(layer, step));
  fence_proxy_async();  // the next token's bulk copies read the keys and values
  if (cta.thread == 0) cta.report();
}

// Behind the last token: it goes to the host.
extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1)
    last_token(const __grid_constant__ StepArgs args, Kept*, int, int step) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  ring_init(cta);
  wait_for_launch_before();
  if (cta.thread < num_consumers) pick(cta, Exchange(args), step - 1);
}
