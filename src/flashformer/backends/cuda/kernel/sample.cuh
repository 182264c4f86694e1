// The next token of every row, chosen by every CTA for itself from the candidates of all.
#pragma once
#include "exchange.cuh"

// A CTA's best candidate for each of a lane's tokens; NaN counts as the largest, with id -1.
struct Best {
  float logit[max_rows / 2];
  int id[max_rows / 2];

  __device__ Best() {
    for (int i = 0; i < max_rows / 2; ++i) {
      logit[i] = -infinity;
      id[i] = config::vocab_size;
    }
  }
};

__device__ __forceinline__ void take_better(float& logit, int& id, float other_logit, int other_id) {
  const bool better = other_logit > logit || (other_logit == logit && other_id < id);
  if (better) {
    logit = other_logit;
    id = other_id;
  }
}

struct HeadEpilogue {
  const Cta& cta;
  Best& best;

  __device__ __forceinline__ void operator()(int tile, int row, int token, int i, float sum) const {
    const int id = tile * tile_rows + row;
    if (token >= cta.args.num_rows || id >= config::vocab_size) return;
    float logit = sum * cta.shared.rstd[token];
    cta.args.logits[u64(token) * config::vocab_size + id] = logit;
    const bool nan = !(logit == logit);
    take_better(best.logit[i], best.id[i], nan ? infinity : logit, nan ? -1 : id);
  }
};

// The CTA's candidates into the exchange.
__device__ __forceinline__ void publish_best(const Cta& cta, const Exchange& exchange, Best& best) {
#pragma unroll
  for (int i = 0; i < max_rows / 2; ++i) {
#pragma unroll
    for (int d = 8; d > 0; d /= 2) {
      const float logit = __shfl_xor_sync(~0u, best.logit[i], d);
      const int id = __shfl_xor_sync(~0u, best.id[i], d);
      take_better(best.logit[i], best.id[i], logit, id);
    }
    if (cta.lane % 16 == 0) {
      cta.shared.best_logit[cta.warp][cta.lane / 16 + 2 * i] = best.logit[i];
      cta.shared.best_id[cta.warp][cta.lane / 16 + 2 * i] = best.id[i];
    }
  }
  cta.consumer_sync();
  if (cta.thread >= cta.args.num_rows) return;
  float logit = -infinity;
  int id = config::vocab_size;
  for (int w = 0; w < num_consumer_warps; ++w) {
    take_better(logit, id, cta.shared.best_logit[w][cta.thread], cta.shared.best_id[w][cta.thread]);
  }
  exchange.best_logit[cta.thread * config::num_ctas + cta.idx] = logit;
  exchange.best_id[cta.thread * config::num_ctas + cta.idx] = id;
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
