// The next token of every row, chosen by every CTA for itself from the candidates of all.
#pragma once
#include "exchange.cuh"

__device__ __forceinline__ void take_better(float& logit, int& id, float other_logit, int other_id) {
  const bool better = other_logit > logit || (other_logit == logit && other_id < id);
  if (better) {
    logit = other_logit;
    id = other_id;
  }
}

// A CTA's best candidate of each token so far, by row of the tile and by the warp of the epilogue, which no other warp
// touches; NaN counts as the largest, with id -1.
__device__ __forceinline__ void clear_best(const Cta& cta) {
#pragma unroll
  for (int i = 0; i < max_rows / 2; ++i) {
    cta.shared.best_logit[cta.warp][i][cta.lane] = -infinity;
    cta.shared.best_id[cta.warp][i][cta.lane] = config::vocab_size;
  }
}

__device__ __forceinline__ void head_output(const Cta& cta, int tile, int row, int token, int i, float sum) {
  const int id = tile * tile_rows + row;
  if (token >= cta.args.num_rows || id >= config::vocab_size) return;
  const float logit = sum * cta.shared.rstd[token];
  cta.args.logits[u64(token) * config::vocab_size + id] = logit;
  const bool nan = !(logit == logit);
  take_better(cta.shared.best_logit[cta.warp][i][cta.lane], cta.shared.best_id[cta.warp][i][cta.lane],
              nan ? infinity : logit, nan ? -1 : id);
}

// The CTA's candidates into the exchange; warp w does token w.
__device__ __forceinline__ void publish_best(const Cta& cta, const Exchange& exchange) {
  cta.consumer_sync();
  const int token = cta.warp;
  if (token >= cta.args.num_rows) return;
  float logit = -infinity;
  int id = config::vocab_size;
  for (int i = cta.lane; i < num_consumer_warps * tile_rows; i += 32) {
    const int lane = token % 2 * tile_rows + i % tile_rows;
    take_better(logit, id, cta.shared.best_logit[i / tile_rows][token / 2][lane],
                cta.shared.best_id[i / tile_rows][token / 2][lane]);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const float other_logit = __shfl_xor_sync(~0u, logit, d);
    const int other_id = __shfl_xor_sync(~0u, id, d);
    take_better(logit, id, other_logit, other_id);
  }
  if (cta.lane == 0) {
    exchange.best_logit[token * config::num_ctas + cta.idx] = logit;
    exchange.best_id[token * config::num_ctas + cta.idx] = id;
  }
}

__device__ __forceinline__ void pick_tokens(const Cta& cta, const Exchange& exchange, int step) {
  if (cta.warp < cta.args.num_rows) {
    float logit = -infinity;
    int id = config::vocab_size;
    for (int i = cta.lane; i < config::num_ctas; i += 32) {
      const int at = cta.warp * config::num_ctas + i;
      take_better(logit, id, ld_cg_f32(exchange.best_logit + at),
                  __float_as_int(ld_cg_f32(reinterpret_cast<const float*>(exchange.best_id + at))));
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      const float other_logit = __shfl_xor_sync(~0u, logit, d);
      const int other_id = __shfl_xor_sync(~0u, id, d);
      take_better(logit, id, other_logit, other_id);
    }
    if (cta.lane == 0) {
      cta.shared.token[cta.warp] = id;
      if (cta.idx == 0) cta.args.out_tokens[step * max_rows + cta.warp] = id;
    }
  }
  cta.consumer_sync();
}
