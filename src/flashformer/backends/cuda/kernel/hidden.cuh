// The hidden state between stages: who owns it, how it travels, how it is normalised.
//
// The fp32 residual of a row lives in the shared memory of the CTA that owns the row in o_proj and down. What travels
// is hidden * norm weight in 16 bits, with one sum of squares a tile; 1 / rms is a factor of the next stage's sums.
#pragma once
#include "matvec.cuh"

// 1 / rms of each token from the sums of its tiles: warp w does token w, all loads on their way at once.
struct FetchRstd {
  static constexpr int n = (hidden_tiles + 31) / 32;
  u32 square[n];
  const u32* words;
  int lane;
  int end;
  u32 tag;

  __device__ __forceinline__ FetchRstd(const Cta& cta, const float* squares, u32 input_tag, bool wanted)
      : tag(input_tag) {
    lane = recomputed(cta.lane);
    end = wanted && cta.warp < cta.args.num_rows ? hidden_tiles : 0;
    words = reinterpret_cast<const u32*>(squares) + cta.warp * hidden_tiles;
#pragma unroll
    for (int j = 0; j < n; ++j) square[j] = lane + 32 * j < end ? ld_relaxed_gpu(words + lane + 32 * j) : tag;
  }
  __device__ __forceinline__ void store(const Cta& cta) {
    if (end == 0) return;
    const Stopwatch stopwatch(cta, WaitKind::packet);
    Patience patience;
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if ((square[j] & 1) != tag) {
          square[j] = ld_relaxed_gpu(words + lane + 32 * j);
          complete = false;
        }
      }
    } while (!complete && !patience.ends(cta.args, cta.shared, WaitKind::packet));
    float sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) sum += lane + 32 * j < hidden_tiles ? __uint_as_float(square[j]) : 0.f;
    sum = warp_sum(sum);
    if (lane == 0) {
      cta.shared.rstd[cta.warp] = rsqrtf(sum / config::hidden_size + config::rms_norm_eps) / config::exchange_scale;
    }
  }
};

// Weights of the norm behind this CTA's rows of the hidden state, early, so that no epilogue waits for memory.
__device__ __forceinline__ void load_norm(const Cta& cta, int first_tile, int end_tile, u64 norm_offset,
                                          float* weights) {
  for (int i = cta.thread; i < (end_tile - first_tile) * tile_rows; i += num_consumers) {
    const int col = first_tile * tile_rows + i;
    weights[i] = col < config::hidden_size ? vector_at(cta, norm_offset)[col] * config::exchange_scale : 0.f;
  }
}

// Output rows of o_proj and down: add to the residual, publish for the next stage.
struct HiddenOutput {
  int first_tile;
  const float* bias;          // [hidden_size] or null
  const float* norm_weights;  // of the CTA's tiles, in shared memory
  u8* out;
  float* squares;

  __device__ __forceinline__ void operator()(const Cta& cta, u32 tag, int tile, int row, int token, float sum) const {
    const int col = tile * tile_rows + row;
    const bool valid = token < cta.args.num_rows;
    float hidden = 0;
    if (valid && col < config::hidden_size) {
      float& residual = cta.shared.residual[tile - first_tile][token][row];
      hidden = residual + (bias ? sum + bias[col] : sum);
      residual = hidden;
    }
    const float scaled = hidden * norm_weights[(tile - first_tile) * tile_rows + row];
    send_halves(cta, out + token * x_row_bytes(config::hidden_size) + col * 2, scaled, tag, valid);
    float square = hidden * hidden;
#pragma unroll
    for (int d = 8; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
    if (row == 0 && valid) send_float(squares + token * hidden_tiles + tile, square, tag);
  }
};

// Byte offset of a pair of columns of a row, in the fragment order of quant/layout.py.
__device__ __forceinline__ u64 fragment_word(int row, int col) {
  const int r = row % tile_rows;
  const int lane = r % 8 * 4 + col % 16 / 4;
  const int word = col % 4 / 2 * 2 + r / 8;
  return u64(row / tile_rows) * (padded(config::hidden_size) * 2 * tile_rows) + col / 16 * 512 + lane * 16 + word * 4;
}

// Embedding rows of the step's tokens: into x (times the first norm's weight) and the residual of the owned rows.
// Every CTA reads all of them, which saves a hand-off.
__device__ __noinline__ void embed(const Cta cta, int first_tile, int end_tile) {
  const float* norm_weight = vector_at(cta, layer_table[0].input_layernorm);
  constexpr int pairs = padded(config::hidden_size) / 2;
  for (int token = 0; token < cta.args.num_rows; ++token) {
    const int id = max(cta.shared.token[token], 0);
    const u8* table = cta.args.image + config::embed_offset;
    float square = 0;
#pragma unroll 4
    for (int pair = cta.thread; pair < pairs; pair += num_consumers) {
      const int col = pair * 2;
      const u32 word = *reinterpret_cast<const u32*>(table + fragment_word(id, col));
      float lo, hi;
      if constexpr (config::weights_f16) {
        lo = cvt_f32_f16(static_cast<u16>(word));
        hi = cvt_f32_f16(static_cast<u16>(word >> 16));
      } else {
        lo = __uint_as_float(word << 16);
        hi = __uint_as_float(word & 0xffff0000u);
      }
      square += lo * lo + hi * hi;
      const float weight_lo = col < config::hidden_size ? norm_weight[col] * config::exchange_scale : 0.f;
      const float weight_hi = col + 1 < config::hidden_size ? norm_weight[col + 1] * config::exchange_scale : 0.f;
      *reinterpret_cast<u32*>(cta.x + token * x_row_stride(config::hidden_size) + col * 2) =
          pack_x(lo * weight_lo, hi * weight_hi);
      const int tile = col / tile_rows;
      if (tile >= first_tile && tile < end_tile) {
        float* residual = &cta.shared.residual[tile - first_tile][token][col % tile_rows];
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

// The rotations of every row's position, for all layers of the step.
__device__ __forceinline__ void load_rotations(const Cta& cta, int step) {
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
