// The five matrices of a decoder as numbers: what the producer streams and the consumers multiply.
#pragma once
#include "exchange.cuh"

enum class Kind : int { qkv = 0, o_proj = 1, gate_up = 2, down = 3, lm_head = 4 };

constexpr int kinds_a_layer = 4;

// The number of a matrix in the order of a step; lm_head counts as the first of the layer after the last.
__device__ __forceinline__ int matrix_number(Kind kind, int layer) {
  return kind == Kind::lm_head ? kinds_a_layer * config::num_layers : kinds_a_layer * layer + static_cast<int>(kind);
}

// Moments of the timeline come in the order of the kinds.
__device__ __forceinline__ Moment moment_of(Moment of_qkv, Kind kind) {
  return static_cast<Moment>(static_cast<int>(of_qkv) + static_cast<int>(kind));
}

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int slot_fragments = config::slot_bytes / 512;
constexpr int warps_a_slot = 2;  // that share its fragments; the others work on the slots before and after
constexpr int slots_at_once = num_consumer_warps / warps_a_slot;

// Activations too wide for shared memory come in windows, two at a time: one is read while one is filled.
__device__ constexpr bool fits_shared(int cols) {
  return max_rows * x_row_stride(cols) <= 2 * (config::window_bytes + 32 * max_rows);
}

// A matrix as tiles of 16 rows, cut into chunks that fit a slot.
template <Kind kind>
struct Stage {
  static constexpr int cols = kind == Kind::o_proj ? config::q_rows
                              : kind == Kind::down ? config::intermediate_size
                                                   : config::hidden_size;
  static constexpr int tiles = kind == Kind::qkv       ? ceil_div(config::qkv_rows, tile_rows)
                               : kind == Kind::gate_up ? ceil_div(config::intermediate_size, tile_rows / 2)
                               : kind == Kind::lm_head ? ceil_div(config::vocab_size, tile_rows)
                                                       : hidden_tiles;
  static constexpr bool normed = kind == Kind::qkv || kind == Kind::gate_up || kind == Kind::lm_head;
  static constexpr bool layered = kind != Kind::lm_head;

  static constexpr int fragments = padded(cols) / 16;  // of a tile: 16 columns, 512 bytes each
  static constexpr u32 tile_bytes = fragments * 512;
  static constexpr int num_chunks = ceil_div(fragments, slot_fragments);
  static constexpr int chunk_fragments = ceil_div(fragments, num_chunks);  // of all chunks but the last
  static constexpr int last_fragments = fragments - (num_chunks - 1) * chunk_fragments;
  static constexpr u32 chunk_bytes = chunk_fragments * 512;

  // Warps that share a tile: each leaves one part of its sums. Which products a part adds depends on their columns only.
  static constexpr int chunks_at_once = num_chunks < slots_at_once ? num_chunks : slots_at_once;
  static constexpr int num_parts = chunks_at_once * warps_a_slot;
  static constexpr int tiles_at_once =
      slots_at_once / chunks_at_once < num_part_buffers ? slots_at_once / chunks_at_once : num_part_buffers;

  static constexpr bool windowed = (kind == Kind::o_proj || kind == Kind::down) && !fits_shared(cols);
  static_assert(!windowed || num_chunks >= slots_at_once, "every warp has a part of every tile");
  static constexpr int window_chunks = windowed ? config::window_bytes / max_rows / (chunk_fragments * 32) : num_chunks;
  static constexpr int num_windows = ceil_div(num_chunks, window_chunks);
  static constexpr int group = windowed ? config::window_tiles : 1;  // tiles that share a pass over the windows

  // This CTA's tiles: contiguous, as even as whole tiles allow (plan/tiles.py).
  static __device__ __forceinline__ int begin(int cta_idx) {
    return static_cast<int>(static_cast<long long>(tiles) * cta_idx / config::num_ctas);
  }
  static __device__ __forceinline__ int end(int cta_idx) { return begin(cta_idx + 1); }

  static __device__ __forceinline__ u64 offset(int layer) {
    if constexpr (layered) return layer_table[layer].matrix[static_cast<int>(kind)];
    return config::lm_head_offset;
  }
  static __device__ __forceinline__ u32 bytes_of(int chunk) {
    return (chunk == num_chunks - 1 ? last_fragments : chunk_fragments) * 512;
  }
};

// Calls body(tile, window_first_chunk, window_end_chunk) in the order in which tiles meet windows of activations.
template <class S, class Body>
__device__ __forceinline__ void for_each_pass(int begin, int end, Body&& body) {
#pragma unroll 1
  for (int group = begin; group < end; group += S::group) {
#pragma unroll 1
    for (int window = 0; window < S::num_windows; ++window) {
#pragma unroll 1
      for (int tile = group; tile < min(group + S::group, end); ++tile) {
        body(tile, window * S::window_chunks, min((window + 1) * S::window_chunks, S::num_chunks));
      }
    }
  }
}
