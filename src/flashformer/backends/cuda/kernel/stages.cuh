// The five matrices of a decoder as numbers: what the producer streams and the consumers multiply, one code for all.
#pragma once
#include "exchange.cuh"

enum class Kind : int { qkv = 0, o_proj = 1, gate_up = 2, down = 3, lm_head = 4 };

__device__ constexpr int tiles_of(int rows) { return (rows + tile_rows - 1) / tile_rows; }

// The step as a sequence of matrices: four a layer, then the head.
constexpr int kinds_a_layer = 4;
constexpr int num_matrices = kinds_a_layer * config::num_layers + 1;

// Moments of the timeline come in the order of the kinds.
__device__ __forceinline__ Moment moment_of(Moment of_qkv, Kind kind) {
  return static_cast<Moment>(static_cast<int>(of_qkv) + static_cast<int>(kind));
}

__device__ __forceinline__ Kind kind_of(int matrix) {
  return matrix == num_matrices - 1 ? Kind::lm_head : static_cast<Kind>(matrix % kinds_a_layer);
}

// How a tile is cut into chunks that fit a slot, and which tiles are this CTA's.
struct Shape {
  int cols;
  int fragments;        // of a tile: 16 columns, 512 bytes each
  int num_chunks;       // of a tile
  int chunk_fragments;  // of all chunks but the last
  int begin;            // first tile of this CTA: contiguous, as even as whole tiles allow (plan/tiles.py)
  int end;

  __device__ __forceinline__ Shape(Kind kind, int cta_idx) {
    cols = kind == Kind::o_proj ? config::q_rows
           : kind == Kind::down ? config::intermediate_size
                                : config::hidden_size;
    const int tiles = kind == Kind::qkv       ? tiles_of(config::qkv_rows)
                      : kind == Kind::gate_up ? (config::intermediate_size + 7) / 8
                      : kind == Kind::lm_head ? tiles_of(config::vocab_size)
                                              : hidden_tiles;
    constexpr int slot = config::slot_bytes / 512;
    fragments = padded(cols) / 16;
    num_chunks = (fragments + slot - 1) / slot;
    chunk_fragments = (fragments + num_chunks - 1) / num_chunks;
    begin = static_cast<int>(static_cast<long long>(tiles) * cta_idx / config::num_ctas);
    end = static_cast<int>(static_cast<long long>(tiles) * (cta_idx + 1) / config::num_ctas);
  }

  __device__ __forceinline__ u32 tile_bytes() const { return fragments * 512; }
  __device__ __forceinline__ int chunk_size(int chunk) const {
    return min(chunk_fragments, fragments - chunk * chunk_fragments);
  }
};

__device__ __forceinline__ u64 matrix_offset(Kind kind, int layer) {
  if (kind == Kind::lm_head) return config::lm_head_offset;
  return layer_table[layer].matrix[static_cast<int>(kind)];
}

// The threads share the rows evenly: log2 of the threads that fetch one row.
__device__ __forceinline__ int row_threads_log2(int num_rows) {
  return 8 - (num_rows > 4 ? 3 : num_rows > 2 ? 2 : num_rows > 1 ? 1 : 0);
}
static_assert(num_consumers == 256 && max_rows == 8, "row_threads_log2 counts on it");

// Activations too wide for shared memory come in windows of whole chunks; each is used for all of a CTA's tiles
// (at most max_group at a time) before the next. The producer walks the same order.
constexpr int max_group = 3;

struct Windows {
  int chunks;  // of one window
  int count;
  int group;   // tiles that share a pass over the windows

  __device__ __forceinline__ Windows(const Shape& shape, const StepArgs& args) {
    if (args.num_rows * x_row_stride(shape.cols) <= args.x_bytes) {
      chunks = shape.num_chunks;
      count = 1;
      group = 1;
    } else {
      // Two windows, one is read while one is filled; a window is one batch of packets for every thread.
      const int row_bytes = min(args.x_bytes / 2 / args.num_rows - 32, 128u << row_threads_log2(args.num_rows));
      chunks = row_bytes / (shape.chunk_fragments * 32);
      count = (shape.num_chunks + chunks - 1) / chunks;
      group = max_group;
    }
  }
};
