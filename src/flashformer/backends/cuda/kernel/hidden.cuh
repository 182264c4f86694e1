// The hidden state between stages: who owns it, how it travels, how it is normalised.
//
// The fp32 residual of a row lives in the shared memory of the CTA that owns the row in o_proj and down. What travels
// is hidden * norm weight in 16 bits, with one sum of squares a tile; 1 / rms is a factor of the next stage's sums.
#pragma once
#include "matvec.cuh"

constexpr int hidden_tiles = padded(config::hidden_size) / tile_rows;

__device__ __forceinline__ const float* vector_at(const Cta& cta, u64 offset) {
  return reinterpret_cast<const float*>(cta.args.image + offset);
}

// Where a stage's 16-bit activations lie in global memory: [max_rows][padded cols], fragment order.
struct Exchange {
  u8* hidden_attention;  // input of qkv
  u8* hidden_mlp;        // input of gate_up and of lm_head
  u8* attention;         // input of o_proj
  u8* mlp;               // input of down
  float* qkv;            // [max_rows][qkv_rows], fp32
  float* squares;        // [2][max_rows][hidden_tiles]: partial sums of squares of hidden_attention, hidden_mlp
  float* best_logit;     // [max_rows][num_ctas]
  int* best_id;          // [max_rows][num_ctas]
  float* partial;        // attention: [max_rows][num_kv_heads][max_chunks][group][head_dim_padded]
  float* partial_stats;  // [max_rows][num_kv_heads][max_chunks][group][2]: maximum and sum
  u32* arrivals;         // [max_rows][num_kv_heads], zero between uses

  __device__ explicit Exchange(const StepArgs& args) {
    u8* p = args.exchange;
    auto take = [&p](u64 bytes) { u8* at = p; p += (bytes + 255) / 256 * 256; return at; };
    hidden_attention = take(u64(max_rows) * x_row_bytes(padded(config::hidden_size)));
    hidden_mlp = take(u64(max_rows) * x_row_bytes(padded(config::hidden_size)));
    attention = take(u64(max_rows) * x_row_bytes(padded(config::q_rows)));
    mlp = take(u64(max_rows) * x_row_bytes(padded(config::intermediate_size)));
    qkv = reinterpret_cast<float*>(take(u64(max_rows) * config::qkv_rows * 4));
    squares = reinterpret_cast<float*>(take(2ull * max_rows * hidden_tiles * 4));
    best_logit = reinterpret_cast<float*>(take(u64(max_rows) * config::num_ctas * 4));
    best_id = reinterpret_cast<int*>(take(u64(max_rows) * config::num_ctas * 4));
    arrivals = reinterpret_cast<u32*>(take(u64(max_rows) * config::num_kv_heads * 4));
    const u64 partials = u64(max_rows) * config::num_kv_heads * config::max_chunks * config::group;
    partial_stats = reinterpret_cast<float*>(take(partials * 2 * 4));
    partial = reinterpret_cast<float*>(take(partials * padded(config::head_dim) * 4));
  }
};

__device__ __forceinline__ void store_x(u8* row, int col, float value) {
  *reinterpret_cast<u16*>(row + x_offset(col)) = static_cast<u16>(pack_x(value, 0.f));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// Activations of another stage into shared memory; all consumers.
template <int cols>
__device__ void load_x(Cta& cta, const u8* source) {
  constexpr int row_vecs = x_row_bytes(padded(cols)) / 16;
  const int total = row_vecs * cta.args.num_rows;
#pragma unroll 4
  for (int i = cta.thread; i < total; i += num_consumers) {
    const int row = i / row_vecs;
    const int at = i % row_vecs;
    *reinterpret_cast<Vec16*>(cta.x + row * x_row_stride(padded(cols)) + at * 16) = ld_cg_16(source + u64(i) * 16);
  }
}

// 1 / rms of each token from the partial sums of its tiles; warp w does token w.
__device__ void load_rstd(Cta& cta, const float* squares) {
  if (cta.warp >= cta.args.num_rows) return;
  float sum = 0;
  for (int i = cta.lane; i < hidden_tiles; i += 32) sum += ld_cg_f32(squares + cta.warp * hidden_tiles + i);
  sum = warp_sum(sum);
  if (cta.lane == 0) {
    cta.shared.rstd[cta.warp] =
        rsqrtf(sum / config::hidden_size + config::rms_norm_eps) / config::exchange_scale;
  }
}

// Output rows of o_proj and down: add to the residual, publish for the next stage.
struct HiddenEpilogue {
  Cta& cta;
  int first_tile;
  const float* bias;         // [hidden_size] or null
  const float* norm_weight;  // of the next norm
  u8* out;
  float* squares;

  __device__ __forceinline__ void operator()(int tile, int row, int token, int, float sum) const {
    const int col = tile * tile_rows + row;
    const bool valid = token < cta.args.num_rows && col < config::hidden_size;
    float hidden = 0;
    if (valid) {
      float& residual = cta.shared.residual[tile - first_tile][token][row];
      hidden = residual + (bias ? sum + bias[col] : sum);
      residual = hidden;
    }
    if (token < cta.args.num_rows) {
      const float weight = valid ? norm_weight[col] : 0.f;
      store_x(out + token * x_row_bytes(padded(config::hidden_size)), col, hidden * weight * config::exchange_scale);
    }
    float square = hidden * hidden;
#pragma unroll
    for (int d = 8; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
    if (row == 0 && token < cta.args.num_rows) squares[token * hidden_tiles + tile] = square;
  }
};

// Byte offset of element (row, col pair) in the fragment order of plan/pack.py.
__device__ __forceinline__ u64 fragment_word(int row, int col) {
  const int r = row % tile_rows;
  const int lane = r % 8 * 4 + col % 8 / 2;
  const int word = col % 16 / 8 * 2 + r / 8;
  return u64(row / tile_rows) * (padded(config::hidden_size) * 2 * tile_rows) + col / 16 * 512 + lane * 16 + word * 4;
}

// Embedding rows of the step's tokens: into x (times the first norm's weight) and the residual of the owned rows.
// Every CTA reads all of them, which saves a hand-off.
__device__ void embed(Cta& cta, const Tiles<config::q_rows>& owned) {
  const float* norm_weight = vector_at(cta, layer_table[0].input_layernorm);
  constexpr int pairs = padded(config::hidden_size) / 2;
  for (int token = 0; token < cta.args.num_rows; ++token) {
    const int id = max(cta.shared.token[token], 0);
    float square = 0;
    for (int pair = cta.thread; pair < pairs; pair += num_consumers) {
      const int col = pair * 2;
      const u32 word = *reinterpret_cast<const u32*>(cta.args.image + config::embed_offset + fragment_word(id, col));
      float lo, hi;
      if constexpr (config::weights_f16) {
        lo = cvt_f32_f16(static_cast<u16>(word));
        hi = cvt_f32_f16(static_cast<u16>(word >> 16));
      } else {
        lo = __uint_as_float(word << 16);
        hi = __uint_as_float(word & 0xffff0000u);
      }
      square += lo * lo + hi * hi;
      const float w_lo = col < config::hidden_size ? norm_weight[col] : 0.f;
      const float w_hi = col + 1 < config::hidden_size ? norm_weight[col + 1] : 0.f;
      *reinterpret_cast<u32*>(cta.x + token * x_row_stride(padded(config::hidden_size)) + x_offset(col)) =
          pack_x(lo * w_lo * config::exchange_scale, hi * w_hi * config::exchange_scale);
      const int tile = col / tile_rows;
      if (tile >= owned.begin && tile < owned.end) {
        float* residual = &cta.shared.residual[tile - owned.begin][token][col % tile_rows];
        residual[0] = lo;
        residual[1] = hi;
      }
    }
    square = warp_sum(square);
    if (cta.lane == 0) cta.shared.warp_sum[cta.warp][token] = square;
  }
  cta.consumer_sync();
  if (cta.thread < cta.args.num_rows) {
    float sum = 0;
    for (int w = 0; w < num_consumer_warps; ++w) sum += cta.shared.warp_sum[w][cta.thread];
    cta.shared.rstd[cta.thread] = rsqrtf(sum / config::hidden_size + config::rms_norm_eps) / config::exchange_scale;
  }
  cta.consumer_sync();
}
