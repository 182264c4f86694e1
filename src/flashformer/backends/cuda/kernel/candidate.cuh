// Candidates for the next token of a row: the best of a CTA, then the best of all.
#pragma once
#include "stages.cuh"

// Token ids below 0 say why there is no token; they win against every id.
constexpr int not_a_number = -1;  // a logit of the row is NaN
constexpr int not_finite = -2;    // the largest logit is not finite
constexpr int abandoned = -3;     // a wait timed out: the values of this token mean nothing

struct Candidate {
  float value = -infinity;
  int id = config::vocab_size;
};

// The larger value, on a tie the lower id.
__device__ __forceinline__ void take_better(Candidate& best, const Candidate& other) {
  if (other.value > best.value || (other.value == best.value && other.id < best.id)) best = other;
}

__device__ __forceinline__ Candidate warp_best(Candidate best) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const Candidate other = {__shfl_xor_sync(~0u, best.value, d), __shfl_xor_sync(~0u, best.id, d)};
    take_better(best, other);
  }
  return best;
}

__device__ __forceinline__ bool has_bit(u32 mask, int row) { return (mask >> row & 1) != 0; }

// Logits lie row by row, padded to whole tiles.
constexpr int logits_stride = tiles_of(config::vocab_size) * tile_rows;

__device__ __forceinline__ float* logits_of(const Cta& cta, int row) {
  return cta.args.logits + row * u64(logits_stride);
}

// A CTA's best candidate of each row so far, by row of the tile and by the warp of the epilogue, which no other warp
// touches.
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
  if (has_bit(cta.args.kept_rows, token)) logits_of(cta, token)[id] = logit;
  Candidate best = {cta.shared.best_logit[cta.warp][i][cta.lane], cta.shared.best_id[cta.warp][i][cta.lane]};
  take_better(best, logit == logit ? Candidate{logit, id} : Candidate{infinity, not_a_number});
  cta.shared.best_logit[cta.warp][i][cta.lane] = best.value;
  cta.shared.best_id[cta.warp][i][cta.lane] = best.id;
}

// The CTA's largest logit of every row into shared.choice; warp w does row w.
__device__ __forceinline__ void gather_best(const Cta& cta) {
  const int row = cta.warp;
  if (row >= cta.args.num_rows) return;
  Candidate best;
  for (int i = cta.lane; i < num_consumer_warps * tile_rows; i += 32) {
    const int lane = row % 2 * tile_rows + i % tile_rows;
    take_better(best, {cta.shared.best_logit[i / tile_rows][row / 2][lane],
                       cta.shared.best_id[i / tile_rows][row / 2][lane]});
  }
  best = warp_best(best);
  if (cta.lane == 0) {
    cta.shared.choice_value[row] = best.value;
    cta.shared.choice_id[row] = best.id;
  }
}
