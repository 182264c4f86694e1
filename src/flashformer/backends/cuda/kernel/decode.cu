// The whole decoder as one persistent kernel: one CTA a streaming multiprocessor, one launch for many tokens.
//
// A producer warp streams every byte that the steps will need through the ring, far ahead of the eight consumer warps.
// CTAs hand values to each other in packets; they meet at a barrier once a token. `Consumer::run` is the model. All
// matrices go through one piece of code: a kernel that fits the instruction cache starts every stage at once.
#include "attention.cuh"
#include "grid_barrier.cuh"
#include "sample.cuh"

// Everything that the steps read, in the order in which the consumers use it.
template <class Sink>
__device__ __forceinline__ void walk(const Cta& cta, Sink& sink, bool wait_for_past) {
  sink.trace(Moment::first_fill, 0);
#pragma unroll 1
  for (int step = 0; step < cta.args.num_steps; ++step) {
#pragma unroll 1
    for (int matrix = 0; matrix < num_matrices; ++matrix) {
      if (cta.aborted()) return;
      const Kind kind = kind_of(matrix);
      const int layer = matrix / kinds_a_layer;
      if (kind == Kind::o_proj) {
        if (wait_for_past && layer == 0 && step > 0) {  // all keys and values of the step before are in their pages
          cta.wait(&cta.shared.kv_ready, (step - 1) & 1, WaitKind::kv_ready);
          fence_proxy_async();
        }
        stream_past(sink, layer, step);
        sink.trace(Moment::past_fill, layer);
      }
      stream_tiles(sink, Shape(kind, cta.idx), cta.args.image + matrix_offset(kind, layer));
      sink.trace(moment_of(Moment::qkv_fill, kind), layer);
    }
  }
}

__device__ __forceinline__ void produce(const Cta& cta) {
  RingWriter ring(cta);
  walk(cta, ring, true);
  ring.drain();
}

__device__ __forceinline__ void prefetch(const Cta& cta) {
  Prefetcher prefetcher(cta);
  walk(cta, prefetcher, false);
}

struct Consumer {
  Cta& cta;
  RingReader ring;
  Exchange exchange;
  u32 buffer = 0;  // of the sums of a tile
  u32 tag = 0;     // of this layer's packets

  __device__ explicit Consumer(Cta& c) : cta(c), ring(c), exchange(c.args) {}

  __device__ __forceinline__ const float* bias(bool exists, u64 offset) const {
    return exists ? vector_at(cta, offset) : nullptr;
  }

  __device__ __forceinline__ Input input_of(Kind kind) const {
    switch (kind) {
      case Kind::o_proj: return {exchange.attention, config::q_rows, tag};
      case Kind::gate_up: return {exchange.hidden_mlp, config::hidden_size, tag};
      case Kind::down: return {exchange.mlp, config::intermediate_size, tag};
      default: return {exchange.hidden_attention, config::hidden_size, tag ^ 1};  // of the layer before
    }
  }

  // Where o_proj and down send the hidden state: times the weights of the norm in front of its reader.
  __device__ __forceinline__ HiddenOutput hidden_output(Kind kind, int layer, int first_tile) const {
    const LayerTable& table = layer_table[layer];
    if (kind == Kind::o_proj) {
      return {first_tile, bias(config::o_bias, table.o_bias), cta.shared.norm[1], exchange.hidden_mlp,
              exchange.squares + max_rows * hidden_tiles};
    }
    return {first_tile, bias(config::mlp_bias, table.down_bias), cta.shared.norm[0], exchange.hidden_attention,
            exchange.squares};
  }

  __device__ __forceinline__ void load_norm_weights(Kind kind, int layer, const Shape& shape) const {
    const bool last = layer + 1 == config::num_layers;
    const u64 offset = kind == Kind::o_proj ? layer_table[layer].post_attention_layernorm
                       : last               ? config::norm_offset
                                            : layer_table[layer + 1].input_layernorm;
    load_norm(cta, shape.begin, shape.end, offset, cta.shared.norm[kind == Kind::down ? 0 : 1]);
  }

  __device__ __forceinline__ void qkv_output(const float* b, int tile, int row, int token, float sum) const {
    const int at = tile * tile_rows + row;
    const bool valid = token < cta.args.num_rows;
    float value = valid ? sum * cta.shared.rstd[token] : 0.f;
    if (b) value += b[at];
    send_singles(cta, exchange.qkv + u64(token) * padded(config::qkv_rows) + at, value, tag, valid);
  }

  // A tile holds 8 rows of gate, then the 8 rows of up of the same index.
  __device__ __forceinline__ void gate_up_output(const float* b, int tile, int row, int token, float sum) const {
    const bool valid = token < cta.args.num_rows;
    float value = valid ? sum * cta.shared.rstd[token] : 0.f;
    if (b) value += b[tile * tile_rows + row];
    const float up = __shfl_down_sync(~0u, value, 8);
    const int col = tile * 8 + row;
    const float act = col < config::intermediate_size ? value / (1.f + __expf(-value)) * up : 0.f;
    send_halves(cta, exchange.mlp + token * x_row_bytes(config::intermediate_size) + col * 2, act, tag,
                valid && row < 8);
  }

  __device__ __forceinline__ void multiply(Kind kind, int layer) {
    const Shape shape(kind, cta.idx);
    const Windows windows(shape, cta.args);
    const Input input = input_of(kind);
    const bool normed = kind == Kind::qkv || kind == Kind::gate_up || kind == Kind::lm_head;
    if (kind == Kind::lm_head) clear_best(cta);
    if (!normed) load_norm_weights(kind, layer, shape);
    const bool embedded = kind == Kind::qkv && layer == 0;  // the first input is already there
    if (windows.count == 1 && !embedded) {
      load_x(cta, input, shape.fragments);
      cta.consumer_sync();
    }
    // Not needed before the first tile's sums are: its way from L2 is hidden behind that tile.
    FetchRstd rstd(cta, exchange.squares + (kind == Kind::gate_up ? max_rows * hidden_tiles : 0), input.tag,
                   normed && !embedded);
    cta.trace(moment_of(Moment::qkv_input, kind), layer);
    const HiddenOutput hidden = hidden_output(kind, layer, shape.begin);
    const float* b = kind == Kind::qkv ? bias(config::qkv_bias, layer_table[layer].qkv_bias)
                     : kind == Kind::gate_up ? bias(config::mlp_bias, layer_table[layer].gate_up_bias)
                                             : nullptr;
    auto epilogue = [&](int tile, int row, int token, int i, float sum) {
      if (cta.drops_packets(layer * kinds_a_layer + static_cast<int>(kind))) return;
      switch (kind) {
        case Kind::qkv: return qkv_output(b, tile, row, token, sum);
        case Kind::gate_up: return gate_up_output(b, tile, row, token, sum);
        case Kind::lm_head: return head_output(cta, tile, row, token, i, sum);
        default: return hidden(cta, tag, tile, row, token, sum);
      }
    };
    if (windows.count == 1) {
      matvec(cta, ring, shape, buffer, rstd, epilogue);
    } else {
      matvec_windows(cta, ring, shape, windows, input, buffer, epilogue);
    }
    cta.trace(moment_of(Moment::qkv, kind), layer);
  }

  // Before the last step that was planned: the other warps leave off where they are.
  __device__ __forceinline__ void end_early() const {
    cta.consumer_sync();
    if (cta.thread == 0) atomicCAS(&cta.shared.aborted, 0u, 1u);
  }

  __device__ __forceinline__ void run() {
    cta.trace(Moment::start);
    start_barriers(cta);
    if (cta.thread < cta.args.num_rows) cta.shared.token[cta.thread] = cta.args.tokens[cta.thread];
    cta.consumer_sync();
#pragma unroll 1
    for (int step = 0; step < cta.args.num_steps; ++step) {
      load_rotations(cta, step);
      const Shape owned(Kind::down, cta.idx);
      embed(cta, owned.begin, owned.end);
      cta.trace(Moment::embed);
#pragma unroll 1
      for (int matrix = 0; matrix < num_matrices; ++matrix) {
        const Kind kind = kind_of(matrix);
        const int layer = min(matrix / kinds_a_layer, config::num_layers - 1);
        if (cta.thread == 0) *static_cast<volatile int*>(&cta.shared.matrix) = matrix;
        cta.delay(matrix);
        if (kind == Kind::o_proj) {
          attention(cta, ring, exchange, layer, step, tag);
          cta.trace(Moment::attention, layer);
        }
        // The way from the host's memory is hidden behind the head, whose first slots have landed long ago.
        if (kind == Kind::lm_head && cta.idx == 0 && cta.thread == 0) cta.shared.stop = ld_relaxed_sys(cta.args.stop);
        multiply(kind, layer);
        if (matrix + 1 == cta.args.stop_after) return end_early();
        if (kind == Kind::down) tag ^= 1;
      }
      if (choose_tokens(cta, exchange, step)) return end_early();
      if (cta.thread == 0) mbarrier_arrive(&cta.shared.kv_ready);
      cta.trace(Moment::sample);
    }
  }
};

extern "C" __global__ void __launch_bounds__(num_consumers + 64, 1) decode(const __grid_constant__ StepArgs args) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  ring_init(cta);
  if (cta.is_producer()) {
    produce(cta);
  } else if (cta.is_prefetcher()) {
    prefetch(cta);
  } else {
    Consumer(cta).run();
    cta.consumer_sync();
    if (cta.thread == 0) cta.report();
  }
}
