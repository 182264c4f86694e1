// The whole decoder as one persistent kernel: one CTA a streaming multiprocessor, one launch for many tokens.
//
// A producer warp streams every byte that the steps will need through the ring, far ahead of the eight consumer warps
// that multiply; a finishing warp turns their sums into each stage's output. CTAs hand values to each other in packets;
// they meet at a barrier once a token. `Consumer::run` is the model.
#include "attention.cuh"
#include "hidden.cuh"
#include "sample.cuh"

// The host's word that the launch shall end, though the token is not complete: CTA 0 asks for it and tells the others by the
// launch's number. All ask three times a layer and look at the answer when they ask again, so that nobody waits for it; who
// waits for a packet asks, too (`Patience`). Whoever knows leaves the layers and abandons the token at its end. The first
// tokens may be firm, so that a host with a wish at every token still gets some.
struct Abandonment {
  const Cta& cta;
  u32 answer = 0;

  __device__ __forceinline__ void ask(int step) {
    if (step < cta.args.firm_steps) return;
    const bool asks_host = cta.idx == 0;
    if (answer == (asks_host ? 1 : cta.args.epoch)) {
      if (asks_host) st_relaxed_gpu(cta.args.abandon, cta.args.epoch);
      cta.end_early();
    }
    answer = asks_host ? ld_relaxed_sys(cta.args.stop) : ld_relaxed_gpu(cta.args.abandon);
  }
};

// Everything that the steps read, in the order in which the consumers use it.
__device__ __forceinline__ void produce(const Cta& cta) {
  RingWriter ring(cta);
  Abandonment abandonment{cta};
  ring.trace(Moment::first_fill, 0);
#pragma unroll 1
  for (int step = 0; step < cta.args.num_steps; ++step) {
#pragma unroll 1
    for (int layer = 0; layer < config::num_layers; ++layer) {
      if (cta.aborted()) return ring.drain();
      stream_tiles<Kind::qkv>(ring, layer);
      if (layer == 0 && step > 0) {  // all keys and values of the step before are in their pages
        cta.wait(shared_address(&cta.shared.kv_ready), (step - 1) & 1, WaitKind::kv_ready);
        fence_proxy_async();
      }
      stream_past(ring, layer, step);
      ring.trace(Moment::past_fill, layer);
      abandonment.ask(step);  // all have left the step before, which is nobody's to abandon any more
      stream_tiles<Kind::o_proj>(ring, layer);
      abandonment.ask(step);
      stream_tiles<Kind::gate_up>(ring, layer);
      abandonment.ask(step);
      stream_tiles<Kind::down>(ring, layer);
    }
    stream_tiles<Kind::lm_head>(ring, config::num_layers);
  }
  ring.drain();
}

// A step's first input comes from the embedding: it is already there.
template <Kind kind>
__device__ __forceinline__ bool is_embedded(int layer) {
  return kind == Kind::qkv && layer == 0;
}

// The norm in front of a matrix.
template <Kind kind>
__device__ __forceinline__ u64 norm_offset(int layer) {
  if constexpr (kind == Kind::lm_head) return config::norm_offset;
  return kind == Kind::gate_up ? layer_table[layer].post_attention_layernorm : layer_table[layer].input_layernorm;
}

struct Consumer {
  Cta& cta;
  RingReader ring;
  Exchange exchange;
  Parts parts;
  u32 tag = 0;  // of this layer's packets
  bool left = false;  // the layers: the token is abandoned

  __device__ explicit Consumer(Cta& c) : cta(c), ring(c), exchange(c.args) {}

  __device__ __forceinline__ void end_early() const {
    cta.consumer_sync();
    if (cta.thread == 0) cta.end_early();
  }

  // The next matrix, and what the host may ask for: to stop early and look at the buffers.
  __device__ __forceinline__ bool begin_stage(int matrix) const {
    cta.begin_stage();
    if (cta.thread == 0) *static_cast<volatile int*>(&cta.shared.matrix) = matrix;
    cta.delay(matrix);
    if (matrix != cta.args.stop_after || matrix == 0) return true;
    cta.worker_sync();
    end_early();
    return false;
  }

  template <Kind kind>
  __device__ __forceinline__ void multiply(int layer, const u8* input, u32 input_tag) {
    using S = Stage<kind>;
    const bool idle = S::may_be_idle && S::count(cta.idx) == 0;
    if constexpr (S::windowed) {
      if (!idle) matvec_windows<S>(cta, ring, input, input_tag, parts);
    } else {
      if constexpr (S::normed) {
        if (!is_embedded<kind>(layer)) load_normed_x<S>(cta, input, input_tag, norm_offset<kind>(layer));
      } else {
        if (!idle) load_x<S>(cta, input, input_tag);
      }
      cta.trace(moment_of(Moment::qkv_input, kind), layer);
      if constexpr (S::in_two) {
        matvec_in_two<S>(cta, ring, input, input_tag, parts);
      } else {
        matvec<S>(cta, ring, parts);
      }
    }
    cta.trace(moment_of(Moment::qkv, kind), layer);
  }

  __device__ __forceinline__ bool run_layer(int layer, int step) {
    const int first = kinds_a_layer * layer;
    if (!begin_stage(first)) return false;
    volatile u32& leaves = cta.shared.leaves;
    if (cta.thread == 0) leaves = cta.aborted();
    multiply<Kind::qkv>(layer, exchange.hidden_attention, tag ^ 1);  // packets of the layer before
    if (!is_embedded<Kind::qkv>(layer) && leaves != 0) {  // all warps met when they loaded their input, so all know it
      left = true;
      ring.lose();
      return true;
    }
    if (!begin_stage(first + 1)) return false;
    attention(cta, ring, exchange, layer, step, tag);
    cta.trace(Moment::attention, layer);
    multiply<Kind::o_proj>(layer, exchange.attention, tag);
    if (!begin_stage(first + 2)) return false;
    multiply<Kind::gate_up>(layer, exchange.hidden_mlp, tag);
    if (!begin_stage(first + 3)) return false;
    multiply<Kind::down>(layer, exchange.mlp, tag);
    tag ^= 1;
    return true;
  }

  __device__ __forceinline__ void run() {
    cta.trace(Moment::start);
    start_barriers(cta);
    if (cta.thread < cta.args.num_rows) cta.shared.token[cta.thread] = cta.args.tokens[cta.thread];
    cta.consumer_sync();
#pragma unroll 1
    for (int step = 0; step < cta.args.num_steps; ++step) {
      load_positions(cta, step);
      embed(cta);
      cta.trace(Moment::embed);
      cta.worker_sync();  // the finisher may use the residual
#pragma unroll 1
      for (int layer = 0; layer < config::num_layers && !left; ++layer) {
        if (!run_layer(layer, step)) return;
      }
      if (!begin_stage(kinds_a_layer * config::num_layers)) return;
      // The way from the host's memory is hidden behind the head, whose first slots have landed long ago.
      if (cta.idx == 0 && cta.thread == 0) cta.shared.stop = ld_relaxed_sys(cta.args.stop);
      multiply<Kind::lm_head>(config::num_layers, exchange.hidden_attention, tag ^ 1);
      cta.worker_sync();  // the finisher has left its candidates
      const bool ends = choose_tokens(cta, step);
      cta.trace(Moment::sample);
      if (ends) break;
      if (cta.thread == 0) mbarrier_arrive(shared_address(&cta.shared.kv_ready));
    }
    cta.worker_sync();  // the finisher sees that it was the last
    end_early();
  }
};

// The finishing warp: what each stage does with the sums of its tiles.
struct Finisher {
  Cta& cta;
  Exchange exchange;
  Best best;
  Parts parts;
  u32 tag = 0;
  u32 epoch;  // of this layer's dated values

  __device__ explicit Finisher(Cta& c) : cta(c), exchange(c.args), epoch(c.args.epoch) {}

  __device__ __forceinline__ void next_layer() {
    tag ^= 1;
    ++epoch;
  }

  __device__ __forceinline__ void qkv_output(int layer, int tile, int token, float value) const {
    const int at = tile * tile_rows + cta.lane % tile_rows;
    if constexpr (config::qkv_bias) value += vector_at(cta, layer_table[layer].qkv_bias)[at];
    send_singles(cta, exchange.qkv + u64(token) * padded(config::qkv_rows) + at, value, tag, token < cta.args.num_rows);
  }

  // A tile holds 8 rows of gate, then the 8 rows of up of the same index.
  // stored: its place in the image, where the biases are in the same order.
  __device__ __forceinline__ void gate_up_output(int layer, int tile, int stored, int token, float value) const {
    const int row = cta.lane % tile_rows;
    if constexpr (config::mlp_bias) value += vector_at(cta, layer_table[layer].gate_up_bias)[stored * tile_rows + row];
    const float up = __shfl_down_sync(~0u, value, 8);
    const int col = tile * 8 + row;
    const float act = col < config::intermediate_size ? __fdividef(value, 1.f + __expf(-value)) * up : 0.f;
    send_halves(cta, exchange.mlp + token * x_row_bytes(config::intermediate_size) + col * 2, act, tag,
                token < cta.args.num_rows && row < 8);
  }

  // Where o_proj and down send the hidden state, and the residual from and to the other of the two. A step's first
  // residual is the embedding, its last is not needed.
  template <Kind kind>
  __device__ __forceinline__ HiddenOutput hidden_output(int layer) const {
    const int first_tile = Stage<kind>::begin(cta.idx);
    if constexpr (kind == Kind::o_proj) {
      const float* bias = config::o_bias ? vector_at(cta, layer_table[layer].o_bias) : nullptr;
      u8* from = layer > 0 ? exchange.residual_attention : nullptr;
      return {first_tile, bias, exchange.hidden_mlp, {from, epoch - 1}, {exchange.residual_mlp, epoch}};
    }
    const float* bias = config::mlp_bias ? vector_at(cta, layer_table[layer].down_bias) : nullptr;
    u8* to = layer + 1 < config::num_layers ? exchange.residual_attention : nullptr;
    return {first_tile, bias, exchange.hidden_attention, {exchange.residual_mlp, epoch}, {to, epoch}};
  }

  template <Kind kind>
  __device__ __forceinline__ void finish(int layer) {
    using S = Stage<kind>;
    const int num_tiles = S::count(cta.idx);
    if (__any_sync(~0u, cta.aborted())) {  // nobody needs the values of an abandoned token
      parts.tile += num_tiles;
      return;
    }
    HiddenOutput hidden = hidden_output<kind>(layer);
    const int half = cta.lane / tile_rows;
#pragma unroll 1
    for (int first = 0; first < num_tiles; first += tiles_finished) {
      const int own = tiles_finished == 2 ? first + half : first;
      const int tile = S::tile(cta.idx, own);
      // Of one token the second half of the warp has the next tile, or nothing to do.
      const int first_token = tiles_finished == 1 ? half : own < num_tiles ? 0 : max_rows;
      if constexpr (kind == Kind::o_proj || kind == Kind::down) hidden.fetch(cta, tile, first_token);
      const TileSums<S> sums(cta, parts, min(tiles_finished, num_tiles - first));
      cta.delay(first);
      if (cta.drops_packets(matrix_number(kind, layer))) continue;
#pragma unroll
      for (int i = 0; i < TileSums<S>::num; ++i) {
        if (2 * i >= cta.args.num_rows) break;
        const int token = first_token + 2 * i;
        const float value = sums.token[i];
        if constexpr (kind == Kind::qkv) {
          qkv_output(layer, tile, token, value);
        } else if constexpr (kind == Kind::gate_up) {
          gate_up_output(layer, tile, S::begin(cta.idx) + own, token, value);
        } else if constexpr (kind == Kind::lm_head) {
          best.take(cta, tile, token, i, value);
        } else {
          hidden(cta, tag, tile, token, i, value);
        }
      }
    }
  }

  // The consumers are about to stop before this matrix.
  __device__ __forceinline__ bool stops_before(int matrix) const {
    if (matrix != cta.args.stop_after || matrix == 0) return false;
    cta.worker_sync();
    return true;
  }

  __device__ __forceinline__ bool run_layer(int layer) {
    const int first = kinds_a_layer * layer;
    if (stops_before(first)) return false;
    finish<Kind::qkv>(layer);
    if (stops_before(first + 1)) return false;
    finish<Kind::o_proj>(layer);
    if (stops_before(first + 2)) return false;
    finish<Kind::gate_up>(layer);
    if (stops_before(first + 3)) return false;
    finish<Kind::down>(layer);
    next_layer();
    return true;
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      cta.worker_sync();  // the residual is that of the embedding
      if (cta.shared.last) return;
#pragma unroll 1
      for (int layer = 0; layer < config::num_layers; ++layer) {
        if (!run_layer(layer)) return;
      }
      if (stops_before(kinds_a_layer * config::num_layers)) return;
      best.clear();
      finish<Kind::lm_head>(config::num_layers);
      best.choose(cta);
      cta.worker_sync();
    }
  }
};

// A thread's part in the launch.
template <class TheConsumer, class TheFinisher>
__device__ __forceinline__ void run_role(Cta& cta) {
  ring_init(cta);
  if (cta.is_producer()) {
    if (cta.produces()) produce(cta);
  } else if (cta.is_finisher()) {
    TheFinisher(cta).run();
  } else {
    TheConsumer(cta).run();
    cta.consumer_sync();
    if (cta.thread == 0) cta.report();
  }
}

extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1) decode(const __grid_constant__ StepArgs args) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  run_role<Consumer, Finisher>(cta);
}
