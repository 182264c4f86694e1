// The five matrices of a decoder as numbers: what the producer streams and the consumers multiply.
#pragma once
#include "exchange.cuh"
#include "format.cuh"

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

constexpr int warps_a_slot = 4;  // that share its runs; the others work on the slots before and after
constexpr int slots_at_once = num_consumer_warps / warps_a_slot;

// Of a CTA's tiles of gate_up those that come from the matrix's end, and last (plan/tiles.py).
constexpr int gate_up_tiles = ceil_div(config::intermediate_size, tile_rows / 2);
constexpr int late_tiles = gate_up_tiles / config::num_ctas >= 4 ? 2 : 0;

// Activations too wide for shared memory come in windows, two at a time: one is read while one is filled.
__device__ constexpr bool fits_shared(int rows, u32 row_bytes) { return rows * row_bytes <= 2 * config::window_bytes; }

template <Kind kind>
struct FormatOf {
  using type = BodyFormat;
};
template <>
struct FormatOf<Kind::lm_head> {
  using type = HeadFormat;
};

// A matrix as tiles of 16 rows, cut into chunks that fit a slot.
template <Kind kind>
struct Stage {
  static constexpr int cols = kind == Kind::o_proj ? config::q_rows
                              : kind == Kind::down ? config::intermediate_size
                                                   : config::hidden_size;
  static constexpr int tiles = kind == Kind::qkv       ? ceil_div(config::qkv_rows, tile_rows)
                               : kind == Kind::gate_up ? gate_up_tiles
                               : kind == Kind::lm_head ? ceil_div(config::vocab_size, tile_rows)
                                                       : hidden_tiles;
  static constexpr bool normed = kind == Kind::qkv || kind == Kind::gate_up || kind == Kind::lm_head;
  // Some CTAs have no tile. They need not know this stage's input, which no other stage reads.
  static constexpr bool may_be_idle = (kind == Kind::o_proj || kind == Kind::down) && residual_travels;
  static constexpr bool layered = kind != Kind::lm_head;

  using F = typename FormatOf<kind>::type;
  static constexpr int blocks = ceil_div(cols, F::block_cols);  // of a tile
  static constexpr int runs = ceil_div(blocks, F::run_blocks);
  static constexpr int last_blocks = blocks - (runs - 1) * F::run_blocks;  // of the last run
  static constexpr u32 tile_bytes = blocks * F::block_bytes + F::row_scale_bytes;
  static constexpr int slot_runs = (config::slot_bytes - F::row_scale_bytes) / F::run_bytes;
  using X = Rows<F, runs>;
  static constexpr bool may_be_wide = kind == Kind::o_proj || kind == Kind::down;
  // Where a step of many rows comes in windows, every warp has a part of every tile, however many rows there are.
  static constexpr int least_chunks =
      may_be_wide && !fits_shared(config::exchange_rows, X::data_bytes) ? slots_at_once : 1;
  static constexpr int full_chunks = ceil_div(runs, slot_runs);
  static constexpr int num_chunks = full_chunks > least_chunks ? full_chunks : least_chunks;
  static constexpr int chunk_runs = ceil_div(runs, num_chunks);  // of all chunks but the last
  static constexpr int last_runs = runs - (num_chunks - 1) * chunk_runs;
  static constexpr u32 chunk_bytes = chunk_runs * F::run_bytes;
  static constexpr u32 last_bytes = tile_bytes - (num_chunks - 1) * chunk_bytes;

  // Warps that share a tile: each leaves one part of its sums. Which products a part adds depends on their columns only.
  static constexpr int chunks_at_once = num_chunks < slots_at_once ? num_chunks : slots_at_once;
  static constexpr int num_parts = chunks_at_once * warps_a_slot;
  static constexpr int last_part = (num_chunks - 1) % chunks_at_once * warps_a_slot + 1;  // has seen the tile's end
  static constexpr int tiles_at_once =
      slots_at_once / chunks_at_once < num_part_buffers ? slots_at_once / chunks_at_once : num_part_buffers;

  static constexpr bool windowed = may_be_wide && !fits_shared(max_rows, X::data_bytes);
  // What all CTAs' last tiles of gate_up send are the last columns of down's input; all others have arrived by the time that
  // a CTA is done with gate_up. Down multiplies them first, and the last when they are there, too.
  static constexpr int early_cols = (gate_up_tiles - late_tiles * config::num_ctas) * (tile_rows / 2);
  static constexpr int early_chunks = early_cols / (chunk_runs * F::run_cols) / 2 * 2;
  static constexpr bool in_two =
      kind == Kind::down && !windowed && late_tiles > 0 && early_chunks > 0 && 2 * early_chunks >= num_chunks;
  static constexpr int fitting_chunks = config::window_bytes / max_rows / (chunk_runs * F::run_cols * 2);
  // Even, if there are several: so every warp keeps to every other fill from one tile of the group to the next, and never
  // waits for one that is further ahead than most_in_flight (geometry.py) allows.
  static constexpr int window_chunks = windowed ? (fitting_chunks > 1 ? fitting_chunks / 2 * 2 : 1)
                                       : in_two ? early_chunks
                                                : num_chunks;
  // By how many chunks the warps move on from tile to tile: of a window of one chunk the next tile is the others'.
  static constexpr int turn = !windowed && !in_two ? num_chunks : window_chunks == 1 ? 1 : 0;
  static constexpr int num_windows = ceil_div(num_chunks, window_chunks);
  // Tiles that share a pass over the windows.
  static constexpr int group = windowed || in_two ? least(config::window_tiles, ceil_div(tiles, config::num_ctas)) : 1;
  static constexpr int early_packets = in_two ? early_chunks * chunk_runs * F::run_cols / 8 : X::packets;

  // A CTA's tiles are end - begin, as even as whole tiles allow (plan/tiles.py).
  static constexpr int shift = kind == Kind::down && residual_travels ? config::num_ctas / 2 : 0;
  static constexpr __device__ __forceinline__ int begin(int cta_idx) {
    return static_cast<int>((static_cast<long long>(tiles) * cta_idx + shift) / config::num_ctas);
  }
  static constexpr __device__ __forceinline__ int end(int cta_idx) { return begin(cta_idx + 1); }
  static constexpr __device__ __forceinline__ int count(int cta_idx) { return end(cta_idx) - begin(cta_idx); }

  // The CTA's i-th tile, by rows. In the image they are neighbours (`stored_tiles` of plan/tiles.py).
  static constexpr __device__ __forceinline__ int tile(int cta_idx, int i) {
    constexpr int late = kind == Kind::gate_up ? late_tiles : 0;
    const int place = begin(cta_idx) + i;
    const int from_end = place - end(cta_idx);  // -1: the last
    return from_end < -late ? place - late * cta_idx : tiles - late * (config::num_ctas - 1 - cta_idx) + from_end;
  }

  static __device__ __forceinline__ u64 offset(int layer) {
    if constexpr (layered) return layer_table[layer].matrix[static_cast<int>(kind)];
    return config::lm_head_offset;
  }
  static __device__ __forceinline__ u32 bytes_of(int chunk) {
    return chunk == num_chunks - 1 ? last_bytes : chunk_bytes;
  }
};

// Calls body(i, window_first_chunk, window_end_chunk) in the order in which a CTA's tiles, from 0 on, meet windows of
// activations.
template <class S, class Body>
__device__ __forceinline__ void for_each_pass(int count, Body&& body) {
#pragma unroll 1
  for (int group = 0; group < count; group += S::group) {
#pragma unroll 1
    for (int window = 0; window < S::num_windows; ++window) {
#pragma unroll 1
      for (int i = group; i < min(group + S::group, count); ++i) {
        body(i, window * S::window_chunks, min((window + 1) * S::window_chunks, S::num_chunks));
      }
    }
  }
}
