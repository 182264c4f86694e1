// The hidden state between stages: who owns it, how it travels, how it is normalised.
//
// The fp32 residual of a row lives in the shared memory of the CTA that owns the row in o_proj and down; where those are
// two CTAs, it goes from one to the other as dated values. Everybody gets the hidden state in 16 bits; every CTA multiplies
// by the norm's weights and adds the squares (fetch.cuh), and 1 / rms is a factor of the next stage's sums.
#pragma once
#include "embedding.cuh"
#include "matvec.cuh"

// The residual on its way from the CTA that owned the rows before, or to the next.
struct ResidualWay {
  u8* values;  // [exchange_rows][hidden_size], dated; null: in shared memory, or nobody needs it
  u32 epoch;

  __device__ __forceinline__ u8* at(int token, int col) const {
    return values + (u64(token) * padded(config::hidden_size) + col) * dated_bytes;
  }
};

// Output rows of o_proj and down: add to the residual, publish for the next stage. Lane: row lane % 16 of its tile.
struct HiddenOutput {
  static constexpr int num = (max_rows + 1) / 2;
  int first_tile;
  const float* bias;  // [hidden_size] or null
  u8* out;
  ResidualWay from;
  ResidualWay to;
  u64 travelling[num];

  // The residual of a tile whose sums are still to come, for the tokens first_token + 2 i.
  __device__ __forceinline__ void fetch(const Cta& cta, int tile, int first_token) {
    if (!residual_travels || from.values == nullptr) return;
    const int col = tile * tile_rows + cta.lane % tile_rows;
#pragma unroll
    for (int i = 0; i < num; ++i) {
      const int token = first_token + 2 * i;
      if (token < cta.args.num_rows && col < config::hidden_size) travelling[i] = load_dated(from.at(token, col));
    }
  }

  __device__ __forceinline__ void operator()(const Cta& cta, u32 tag, int tile, int token, int i, float sum) const {
    const int row = cta.lane % tile_rows;
    const int col = tile * tile_rows + row;
    const bool valid = token < cta.args.num_rows;
    float hidden = 0;
    if (valid && col < config::hidden_size) {
      float& stays = cta.shared.residual[tile - first_tile][token][row];
      const bool comes = residual_travels && from.values != nullptr;
      const float residual = comes ? await_dated(cta, travelling[i], from.at(token, col), from.epoch) : stays;
      hidden = residual + (bias ? sum + bias[col] : sum);
      if constexpr (!residual_travels) {
        stays = hidden;
      } else if (to.values != nullptr) {
        send_dated(to.at(token, col), hidden, to.epoch);
      }
    }
    send_halves(cta, out + token * x_row_bytes(config::hidden_size) + col * 2, hidden * config::exchange_scale, tag,
                valid);
  }
};

// Embedding rows of the step's tokens: into x (times the first norm's weight) and the residual of the owned rows.
// Every CTA reads all of them, which saves a hand-off.
__device__ __noinline__ void embed(const Cta cta) {
  const int begin = Stage<Kind::o_proj>::begin(cta.idx);
  const int end = Stage<Kind::o_proj>::end(cta.idx);
  const float* norm_weight = vector_at(cta, layer_table[0].input_layernorm);
  using X = Stage<Kind::qkv>::X;
  constexpr int pairs = X::packets * 4;
  for (int token = 0; token < cta.args.num_rows; ++token) {
    const int id = max(cta.shared.token[token], 0);
    const u8* table = cta.args.image + config::embed_offset;
    float square = 0;
#pragma unroll 4
    for (int pair = cta.thread; pair < pairs; pair += num_consumers) {
      const int col = pair * 2;
      float lo = 0, hi = 0;
      if (col < config::hidden_size) {
        const float2 weights = embedding_pair(table, id, col);
        lo = weights.x;
        hi = col + 1 < config::hidden_size ? weights.y : 0.f;
      }
      square += lo * lo + hi * hi;
      const float weight_lo = col < config::hidden_size ? norm_weight[col] * config::exchange_scale : 0.f;
      const float weight_hi = col + 1 < config::hidden_size ? norm_weight[col + 1] * config::exchange_scale : 0.f;
      *reinterpret_cast<u32*>(cta.x + token * X::stride + col * 2) =
          pack_x(lo * weight_lo, hi * weight_hi);
      const int tile = col / tile_rows;
      if (tile >= begin && tile < end) {
        float* residual = &cta.shared.residual[tile - begin][token][col % tile_rows];
        residual[0] = lo;
        residual[1] = hi;
      }
    }
    square = warp_sum(square);
    if (cta.lane == 0) leave_squares(cta, token, square * (config::exchange_scale * config::exchange_scale));
  }
  cta.consumer_sync();
  convert_x<Stage<Kind::qkv>>(cta);
  cta.consumer_sync();
}

// cos and sin of position * frequency, attention factor included. The angle is reduced to [-pi, pi] in two exact
// steps (Cody & Waite 1980), good to a few 1e-7 for positions below 2^20.
__device__ __forceinline__ float2 rotation(float angle, float factor) {
  const float turns = rintf(angle * 0.15915494309189535f);
  float r = fmaf(-turns, 6.28125f, angle);
  r = fmaf(-turns, 1.9353071795864769e-3f, r);
  float s, c;
  __sincosf(r, &s, &c);
  return make_float2(c * factor, s * factor);
}

// What every row's position means for all layers of the step: the page of its key and value, and the rotations.
__device__ __forceinline__ void load_positions(const Cta& cta, int step) {
  if (cta.thread < cta.args.num_rows) {
    const int page = (cta.args.positions[cta.thread] + step) / config::page_tokens;
    cta.shared.own_page[cta.thread] = cta.args.page_table[cta.args.slots[cta.thread] * cta.args.max_pages + page];
  }
  constexpr int half = config::rotary_dim / 2;
  if constexpr (half > 0) {
    for (int rope = 0; rope < config::num_ropes; ++rope) {
      const float* inv_freq = vector_at(cta, rope_table[rope].inv_freq);
      for (int i = cta.thread; i < half * cta.args.num_rows; i += num_consumers) {
        const float position = static_cast<float>(cta.args.positions[i / half] + step);
        cta.shared.rotation[rope][i / half][i % half] =
            rotation(position * inv_freq[i % half], rope_table[rope].attention_factor);
      }
    }
  }
}
