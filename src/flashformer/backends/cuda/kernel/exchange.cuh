// The buffers through which CTAs hand values to each other, all in global memory (and, in practice, in L2).
#pragma once
#include "ring.cuh"

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int padded(int cols) { return (cols + 15) / 16 * 16; }
__device__ constexpr u32 x_row_bytes(int cols) { return padded(cols) * 2; }

constexpr int hidden_tiles = padded(config::hidden_size) / tile_rows;
constexpr int head_dim_padded = padded(config::head_dim);
// Where there are more CTAs than tiles of the hidden state, o_proj's tiles and down's belong to different CTAs.
constexpr bool residual_travels = hidden_tiles < config::num_ctas;

constexpr int exchange_rows = config::exchange_rows;  // for kernels of any max_rows

constexpr int num_q_heads = config::num_kv_heads * config::group;
constexpr u32 dated_bytes = 8;  // a float and the number of a layer (packet.cuh)
constexpr u32 partial_bytes = (2 + head_dim_padded) * dated_bytes;  // of a chunk and query head

// codegen/exchange.py computes the same places.
struct Exchange {
  // In packets; filled with ones before the launch.
  u8* hidden_attention;  // [exchange_rows][hidden_size] 16 bit: hidden state: input of qkv and lm_head
  u8* hidden_mlp;        // [exchange_rows][hidden_size] 16 bit, hidden state: input of gate_up
  u8* attention;         // [exchange_rows][q_rows] 16 bit: input of o_proj
  u8* mlp;               // [exchange_rows][intermediate_size] 16 bit: input of down
  float* qkv;            // [exchange_rows][qkv_rows padded]: input of attention
  // Ordered by the barrier at a step's end.
  float* best_logit;     // [exchange_rows][num_ctas]
  int* best_id;          // [exchange_rows][num_ctas]
  float* top;            // [exchange_rows][num_ctas]: largest adjusted logits
  u32* stop;             // the host wants the launch to end with this token
  // Dated values.
  u8* residual_attention;  // [exchange_rows][hidden_size]: from down to o_proj, if it travels
  u8* residual_mlp;        // likewise from o_proj to down
  u8* partial;           // attention: [exchange_rows][num_q_heads][max_chunks][maximum, sum, head_dim padded values]

  __device__ explicit Exchange(const StepArgs& args) {
    u8* p = args.exchange;
    auto take = [&p](u64 bytes) {
      u8* at = p;
      p += (bytes + 255) / 256 * 256;
      return at;
    };
    hidden_attention = take(u64(exchange_rows) * x_row_bytes(config::hidden_size));
    hidden_mlp = take(u64(exchange_rows) * x_row_bytes(config::hidden_size));
    attention = take(u64(exchange_rows) * x_row_bytes(config::q_rows));
    mlp = take(u64(exchange_rows) * x_row_bytes(config::intermediate_size));
    qkv = reinterpret_cast<float*>(take(u64(exchange_rows) * padded(config::qkv_rows) * 4));
    best_logit = reinterpret_cast<float*>(take(u64(exchange_rows) * config::num_ctas * 4));
    best_id = reinterpret_cast<int*>(take(u64(exchange_rows) * config::num_ctas * 4));
    top = reinterpret_cast<float*>(take(u64(exchange_rows) * config::num_ctas * 4));
    stop = reinterpret_cast<u32*>(take(4));
    const u64 residual_bytes = residual_travels ? u64(exchange_rows) * padded(config::hidden_size) * dated_bytes : 0;
    residual_attention = take(residual_bytes);
    residual_mlp = take(residual_bytes);
    partial = take(u64(exchange_rows) * num_q_heads * config::max_chunks * partial_bytes);
  }
};

__device__ __forceinline__ const float* vector_at(const Cta& cta, u64 offset) {
  return reinterpret_cast<const float*>(cta.args.image + offset);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
