// The whole decoder as one persistent kernel: one CTA a streaming multiprocessor, one launch for many tokens.
//
// A producer warp streams every byte that the steps will need through the ring, far ahead of the eight consumer warps,
// which meet at a grid barrier after each stage. Read `consume` from top to bottom: it is the model.
#include "attention.cuh"
#include "grid_barrier.cuh"
#include "sample.cuh"

using QkvTiles = Tiles<config::hidden_size>;
using OProjTiles = Tiles<config::q_rows>;
using DownTiles = Tiles<config::intermediate_size>;

__device__ constexpr int tiles_of(int rows) { return (rows + tile_rows - 1) / tile_rows; }

__device__ void produce(Cta& cta) {
  RingWriter ring(cta);
  const u8* image = cta.args.image;
  const QkvTiles qkv(cta.idx, tiles_of(config::qkv_rows));
  const OProjTiles o_proj(cta.idx, tiles_of(config::hidden_size));
  const QkvTiles gate_up(cta.idx, (config::intermediate_size + 7) / 8);
  const DownTiles down(cta.idx, tiles_of(config::hidden_size));
  const QkvTiles lm_head(cta.idx, tiles_of(config::vocab_size));
  for (int step = 0; step < cta.args.num_steps; ++step) {
    for (int layer = 0; layer < config::num_layers; ++layer) {
      const LayerTable& table = layer_table[layer];
      stream_tiles(ring, qkv, image + table.qkv);
      if (layer == 0 && step > 0) {  // the keys and values of the step before are in their pages
        cta.wait(&cta.shared.kv_ready, (step - 1) & 1, WaitKind::kv_ready);
        fence_proxy_async();
      }
      stream_past(ring, layer, step);
      stream_tiles(ring, o_proj, image + table.o_proj);
      stream_tiles(ring, gate_up, image + table.gate_up);
      stream_tiles(ring, down, image + table.down);
    }
    stream_tiles(ring, lm_head, image + config::lm_head_offset);
  }
  ring.drain();
}

struct Consumer {
  Cta& cta;
  RingReader ring;
  Exchange exchange;
  OProjTiles owned;  // tiles of the hidden state: the same of o_proj and of down
  int stages = 0;

  __device__ explicit Consumer(Cta& c)
      : cta(c), ring(c), exchange(c.args), owned(c.idx, tiles_of(config::hidden_size)) {}

  // True if the step ends here: the host wants to look at the buffers (args.stop_after_stage).
  __device__ bool stage_done() {
    grid_barrier(cta);
    return ++stages == cta.args.stop_after_stage;
  }

  __device__ const float* bias(bool exists, u64 offset) const { return exists ? vector_at(cta, offset) : nullptr; }

  __device__ void load_hidden(const u8* hidden, int which) {
    load_x<config::hidden_size>(cta, hidden);
    load_rstd(cta, exchange.squares + which * max_rows * hidden_tiles);
    cta.consumer_sync();
  }

  __device__ void qkv(int layer) {
    const float* b = bias(config::qkv_bias, layer_table[layer].qkv_bias);
    const QkvTiles tiles(cta.idx, tiles_of(config::qkv_rows));
    matvec<config::hidden_size>(cta, ring, tiles, SharedX::make<config::hidden_size>(cta),
                                [&](int tile, int row, int token, int, float sum) {
                                  const int r = tile * tile_rows + row;
                                  if (token >= cta.args.num_rows || r >= config::qkv_rows) return;
                                  const float value = sum * cta.shared.rstd[token];
                                  exchange.qkv[u64(token) * config::qkv_rows + r] = b ? value + b[r] : value;
                                });
  }

  // Rows that end in the residual: attention's and the MLP's output.
  template <int cols>
  __device__ void to_hidden(const u8* input, const HiddenEpilogue& epilogue) {
    const Tiles<cols> tiles(cta.idx, tiles_of(config::hidden_size));
    if (cta.args.num_rows * x_row_stride(padded(cols)) <= cta.args.x_bytes) {
      load_x<cols>(cta, input);
      cta.consumer_sync();
      matvec<cols>(cta, ring, tiles, SharedX::make<cols>(cta), epilogue);
    } else {
      matvec<cols>(cta, ring, tiles, GlobalX::make<cols>(cta, input), epilogue);
    }
  }

  __device__ void o_proj(int layer) {
    const LayerTable& table = layer_table[layer];
    to_hidden<config::q_rows>(
        exchange.attention,
        {cta, owned.begin, bias(config::o_bias, table.o_bias), vector_at(cta, table.post_attention_layernorm),
         exchange.hidden_mlp, exchange.squares + max_rows * hidden_tiles});
  }

  __device__ void gate_up(int layer) {
    load_hidden(exchange.hidden_mlp, 1);
    const float* b = bias(config::mlp_bias, layer_table[layer].gate_up_bias);
    const QkvTiles tiles(cta.idx, (config::intermediate_size + 7) / 8);
    matvec<config::hidden_size>(
        cta, ring, tiles, SharedX::make<config::hidden_size>(cta), [&](int tile, int row, int token, int, float sum) {
          float value = token < cta.args.num_rows ? sum * cta.shared.rstd[token] : 0.f;
          if (b) value += b[tile * tile_rows + row];
          const float up = __shfl_down_sync(~0u, value, 8);
          const int col = tile * 8 + row;
          if (row >= 8 || token >= cta.args.num_rows) return;
          const float act = col < config::intermediate_size ? value / (1.f + __expf(-value)) * up : 0.f;
          store_x(exchange.mlp + token * x_row_bytes(padded(config::intermediate_size)), col, act);
        });
  }

  __device__ void down(int layer) {
    const LayerTable& table = layer_table[layer];
    const bool last = layer + 1 == config::num_layers;
    const u64 norm = last ? config::norm_offset : layer_table[last ? layer : layer + 1].input_layernorm;
    to_hidden<config::intermediate_size>(
        exchange.mlp, {cta, owned.begin, bias(config::mlp_bias, table.down_bias), vector_at(cta, norm),
                       exchange.hidden_attention, exchange.squares});
  }

  __device__ void lm_head() {
    load_hidden(exchange.hidden_attention, 0);
    Best best;
    const QkvTiles tiles(cta.idx, tiles_of(config::vocab_size));
    matvec<config::hidden_size>(cta, ring, tiles, SharedX::make<config::hidden_size>(cta), HeadEpilogue{cta, best});
    publish_best(cta, exchange, best);
  }

  // Padding of the last 16-column block is never written by an epilogue that stops at the true size.
  __device__ void run() {
    if (cta.thread < cta.args.num_rows) cta.shared.token[cta.thread] = cta.args.tokens[cta.thread];
    cta.consumer_sync();
    for (int step = 0; step < cta.args.num_steps; ++step) {
      embed(cta, owned);
      for (int layer = 0; layer < config::num_layers; ++layer) {
        if (layer > 0) load_hidden(exchange.hidden_attention, 0);
        qkv(layer);
        if (stage_done()) return;
        attention(cta, ring, exchange, layer, step);
        if (stage_done()) return;
        if (layer + 1 == config::num_layers && cta.thread == 0) mbarrier_arrive(&cta.shared.kv_ready);
        o_proj(layer);
        if (stage_done()) return;
        gate_up(layer);
        if (stage_done()) return;
        down(layer);
        if (stage_done()) return;
      }
      lm_head();
      if (stage_done()) return;
      pick_tokens(cta, exchange, step);
    }
  }
};

extern "C" __global__ void __launch_bounds__(num_consumers + 32, 1) decode(const __grid_constant__ StepArgs args) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Cta cta(args, dynamic, shared);
  ring_init(cta);
  if (cta.is_producer()) {
    produce(cta);
  } else {
    Consumer(cta).run();
  }
}
