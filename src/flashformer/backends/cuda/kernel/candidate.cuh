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
constexpr int logits_stride = ceil_div(config::vocab_size, tile_rows) * tile_rows;

__device__ __forceinline__ float* logits_of(const Cta& cta, int row) {
  return cta.args.logits + row * u64(logits_stride);
}

// The finishing warp's best candidates so far. Lane: row lane % 16 of its tiles, tokens lane / 16 + 2 i, or all of one.
struct Best {
  static constexpr int num = (max_rows + 1) / 2;
  Candidate candidate[num];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < num; ++i) candidate[i] = {};
  }
  // A row of a tile of the head.
  __device__ __forceinline__ void take(const Cta& cta, int tile, int token, int i, float logit) {
    const int id = tile * tile_rows + cta.lane % tile_rows;
    if (token >= cta.args.num_rows || id >= config::vocab_size) return;
    if (has_bit(cta.args.kept_rows, token)) logits_of(cta, token)[id] = logit;
    take_better(candidate[i], logit == logit ? Candidate{logit, id} : Candidate{infinity, not_a_number});
  }
  // The CTA's largest logit of every row into shared.choice.
  __device__ __forceinline__ void choose(const Cta& cta) {
#pragma unroll
    for (int i = 0; i < num; ++i) {
#pragma unroll
      for (int d = tiles_finished * tile_rows / 2; d > 0; d /= 2) {
        const Candidate other = {__shfl_xor_sync(~0u, candidate[i].value, d), __shfl_xor_sync(~0u, candidate[i].id, d)};
        take_better(candidate[i], other);
      }
      const int row = cta.lane / tile_rows + 2 * i;
      if (cta.lane % tile_rows == 0 && row < cta.args.num_rows) {
        cta.shared.choice_value[row] = candidate[i].value;
        cta.shared.choice_id[row] = candidate[i].id;
      }
    }
  }
};
