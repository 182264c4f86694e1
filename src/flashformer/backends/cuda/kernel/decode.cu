// The whole decoder as one persistent kernel: one CTA a streaming multiprocessor, one launch for many tokens.
//
// A producer warp streams every byte that the steps will need through the ring, far ahead of the eight consumer warps.
// CTAs hand values to each other in packets; they meet at a barrier once a token. `Consumer::run` is the model.
#include "attention.cuh"
#include "grid_barrier.cuh"
#include "sample.cuh"

using HiddenTiles = Tiles<config::hidden_size>;     // columns of qkv, gate_up and lm_head
using OProjTiles = Tiles<config::q_rows>;
using DownTiles = Tiles<config::intermediate_size>;

__device__ constexpr int tiles_of(int rows) { return (rows + tile_rows - 1) / tile_rows; }
constexpr int gate_up_tiles = (config::intermediate_size + 7) / 8;  // 8 gate rows and the 8 up rows of the same index

// Everything that the steps read, in the order in which the consumers use it.
template <class Sink>
__device__ __forceinline__ void walk(const Cta& cta, Sink& ring, bool wait_for_past) {
  const u8* image = cta.args.image;
  for (int step = 0; step < cta.args.num_steps; ++step) {
    for (int layer = 0; layer < config::num_layers; ++layer) {
      const LayerTable& table = layer_table[layer];
      stream_tiles(ring, HiddenTiles(cta.idx, tiles_of(config::qkv_rows)), image + table.qkv);
      if (wait_for_past && layer == 0 && step > 0) {  // all keys and values of the step before are in their pages
        cta.wait(&cta.shared.kv_ready, (step - 1) & 1, WaitKind::kv_ready);
        fence_proxy_async();
      }
      stream_past(ring, layer, step);
      stream_tiles(ring, OProjTiles(cta.idx, tiles_of(config::hidden_size)), image + table.o_proj);
      stream_tiles(ring, HiddenTiles(cta.idx, gate_up_tiles), image + table.gate_up);
      stream_tiles(ring, DownTiles(cta.idx, tiles_of(config::hidden_size)), image + table.down);
    }
    stream_tiles(ring, HiddenTiles(cta.idx, tiles_of(config::vocab_size)), image + config::lm_head_offset);
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
  OProjTiles owned;  // tiles of the hidden state: the same of o_proj and of down
  u32 buffer = 0;    // of the sums of a tile
  u32 tag = 0;       // of this layer's packets
  int stages = 0;

  __device__ explicit Consumer(Cta& c)
      : cta(c), ring(c), exchange(c.args), owned(c.idx, tiles_of(config::hidden_size)) {}

  __device__ __forceinline__ const float* bias(bool exists, u64 offset) const {
    return exists ? vector_at(cta, offset) : nullptr;
  }

  __device__ __forceinline__ void load_hidden(const u8* hidden, int which, u32 input_tag) {
    FetchRstd rstd(cta, exchange.squares + which * max_rows * hidden_tiles, input_tag);
    load_x<config::hidden_size>(cta, {hidden, input_tag});
    rstd.store(cta);
    cta.consumer_sync();
    cta.trace();
  }

  __device__ __forceinline__ void qkv(int layer) {
    const HiddenTiles tiles(cta.idx, tiles_of(config::qkv_rows));
    if (layer > 0) load_hidden(exchange.hidden_attention, 0, tag ^ 1);
    const float* b = bias(config::qkv_bias, layer_table[layer].qkv_bias);
    matvec(cta, ring, tiles, buffer, [&](int tile, int row, int token, int, float sum) {
      const int at = tile * tile_rows + row;
      const bool valid = token < cta.args.num_rows;
      float value = valid ? sum * cta.shared.rstd[token] : 0.f;
      if (b) value += b[at];
      send_singles(cta, exchange.qkv + u64(token) * padded(config::qkv_rows) + at, value, tag, valid);
    });
  }

  // Stages that end in the residual.
  template <int cols>
  __device__ __forceinline__ void to_hidden(const u8* input, u64 norm_offset, int which, const float* b, u8* out) {
    float* weights = cta.shared.norm[which];
    load_norm_weights(cta, owned.begin, owned.end, norm_offset, weights);
    const HiddenEpilogue epilogue{cta, owned.begin, b, weights, out, exchange.squares + which * max_rows * hidden_tiles,
                                  tag};
    const Tiles<cols> tiles(cta.idx, tiles_of(config::hidden_size));
    const Windows<cols> windows(cta.args);
    if (windows.count == 1) {
      load_x<cols>(cta, {input, tag});
      cta.consumer_sync();
      cta.trace();
      matvec(cta, ring, tiles, buffer, epilogue);
    } else {
      matvec_windows(cta, ring, tiles, windows, {input, tag}, buffer, epilogue);
    }
  }

  __device__ __forceinline__ void o_proj(int layer) {
    const LayerTable& table = layer_table[layer];
    to_hidden<config::q_rows>(exchange.attention, table.post_attention_layernorm, 1,
                              bias(config::o_bias, table.o_bias), exchange.hidden_mlp);
  }

  __device__ __forceinline__ void gate_up(int layer) {
    const HiddenTiles tiles(cta.idx, gate_up_tiles);
    load_hidden(exchange.hidden_mlp, 1, tag);
    const float* b = bias(config::mlp_bias, layer_table[layer].gate_up_bias);
    matvec(cta, ring, tiles, buffer, [&](int tile, int row, int token, int, float sum) {
      const bool valid = token < cta.args.num_rows;
      float value = valid ? sum * cta.shared.rstd[token] : 0.f;
      if (b) value += b[tile * tile_rows + row];
      const float up = __shfl_down_sync(~0u, value, 8);
      const int col = tile * 8 + row;
      const float act = col < config::intermediate_size ? value / (1.f + __expf(-value)) * up : 0.f;
      send_halves(cta, exchange.mlp + token * x_row_bytes(config::intermediate_size) + col * 2, act, tag,
                  valid && row < 8);
    });
  }

  __device__ __forceinline__ void down(int layer) {
    const bool last = layer + 1 == config::num_layers;
    const u64 norm = last ? config::norm_offset : layer_table[last ? layer : layer + 1].input_layernorm;
    to_hidden<config::intermediate_size>(exchange.mlp, norm, 0, bias(config::mlp_bias, layer_table[layer].down_bias),
                                         exchange.hidden_attention);
  }

  __device__ __forceinline__ void lm_head() {
    const HiddenTiles tiles(cta.idx, tiles_of(config::vocab_size));
    Best best;
    load_hidden(exchange.hidden_attention, 0, tag ^ 1);
    matvec(cta, ring, tiles, buffer, HeadEpilogue{cta, best});
    publish_best(cta, exchange, best);
  }

  // The host may ask to stop early and look at the buffers: everybody else runs on without waiting.
  __device__ __forceinline__ bool stop_here() {
    cta.trace();
    if (++stages != cta.args.stop_after_stage) return false;
    cta.consumer_sync();
    if (cta.thread == 0) *static_cast<volatile u32*>(&cta.shared.aborted) = 1;
    return true;
  }

  __device__ __forceinline__ void run() {
    if (cta.thread < cta.args.num_rows) cta.shared.token[cta.thread] = cta.args.tokens[cta.thread];
    cta.consumer_sync();
    for (int step = 0; step < cta.args.num_steps; ++step) {
      load_rotations(cta, step);
      embed(cta, owned.begin, owned.end);
      cta.trace();
      for (int layer = 0; layer < config::num_layers; ++layer, tag ^= 1) {
        qkv(layer);
        if (stop_here()) return;
        attention(cta, ring, exchange, layer, step, tag);
        if (stop_here()) return;
        o_proj(layer);
        if (stop_here()) return;
        gate_up(layer);
        if (stop_here()) return;
        down(layer);
        if (stop_here()) return;
      }
      lm_head();
      cta.trace();
      grid_barrier(cta);
      if (cta.thread == 0) mbarrier_arrive(&cta.shared.kv_ready);
      pick_tokens(cta, exchange, step);
      cta.trace();
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
    if constexpr (config::arch >= 90 && config::prefetch_ahead > 0) prefetch(cta);
  } else {
    Consumer(cta).run();
    cta.consumer_sync();
    if (cta.thread == 0) cta.report();
  }
}
