// Tiles of 16 rows times the activations of 1 to 8 tokens, on the tensor cores.
//
// Weights are operand A in fragment order (plan/pack.py), tokens the 8 columns of operand B. The eight warps share
// a slot's columns; their sums are added in a fixed order, so a token's result depends neither on the other tokens
// nor on the time of day. An epilogue (one warp a tile, in turn) does with the 16 sums what the stage is for.
#pragma once
#include "ring.cuh"

// Where one element of an activation vector lies within its row: 32 bytes for each 16 columns, B-fragment order.
__device__ __forceinline__ u32 x_offset(int col) {
  return (col / 16) * 32 + (col % 8) / 2 * 8 + (col % 16) / 8 * 4 + (col % 2) * 2;
}

__device__ constexpr u32 x_row_bytes(int cols_padded) { return cols_padded * 2; }
__device__ constexpr u32 x_row_stride(int cols_padded) { return cols_padded * 2 + 32; }  // +32: tokens fall on different banks
__device__ constexpr int padded(int cols) { return (cols + 15) / 16 * 16; }

__device__ __forceinline__ u32 pack_x(float lo, float hi) {
  if constexpr (config::weights_f16) return cvt_f16x2(lo, hi);
  return cvt_bf16x2(lo, hi);
}

__device__ __forceinline__ void mma(float (&acc)[4], const Vec16& a, uint2 b) {
  if constexpr (config::weights_f16) {
    mma_f16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  } else {
    mma_bf16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  }
}

// A matrix as one CTA sees it: its own tiles, and how a tile is cut into slots.
template <int cols>
struct Tiles {
  static constexpr int fragments = padded(cols) / 16;  // of a tile, 512 bytes each
  static constexpr int fragments_a_slot = config::slot_bytes / 512;
  static constexpr int num_chunks = (fragments + fragments_a_slot - 1) / fragments_a_slot;
  static constexpr int chunk_fragments = (fragments + num_chunks - 1) / num_chunks;  // of all chunks but the last
  static constexpr u32 tile_bytes = fragments * 512;
  static constexpr int warp_fragments = (chunk_fragments + num_consumer_warps - 1) / num_consumer_warps;

  int begin;
  int end;

  // Contiguous, as even as whole tiles allow; plan/tiles.py is the same rule.
  __device__ Tiles(int cta_idx, int num_tiles)
      : begin(static_cast<int>(static_cast<long long>(num_tiles) * cta_idx / config::num_ctas)),
        end(static_cast<int>(static_cast<long long>(num_tiles) * (cta_idx + 1) / config::num_ctas)) {}
};

template <int cols>
__device__ void stream_tiles(RingWriter& ring, const Tiles<cols>& tiles, const u8* matrix) {
  using T = Tiles<cols>;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    const u8* source = matrix + static_cast<u64>(tile) * T::tile_bytes;
    for (int chunk = 0; chunk < T::num_chunks; ++chunk) {
      const int first = chunk * T::chunk_fragments;
      const int count = min(T::chunk_fragments, T::fragments - first);
      ring.fill(source + first * 512, count * 512);
    }
  }
}

// Operand B of one 16-column block for this lane: tokens are the lane's group, zero beyond the step's rows.
struct SharedX {
  const u8* base;
  bool active;

  template <int cols>
  __device__ static SharedX make(const Cta& cta) {
    const int token = cta.lane / 4;
    return {cta.x + token * x_row_stride(padded(cols)) + cta.lane % 4 * 8, token < cta.args.num_rows};
  }
  __device__ __forceinline__ uint2 operator()(int fragment) const {
    if (!active) return make_uint2(0, 0);
    return *reinterpret_cast<const uint2*>(base + fragment * 32);
  }
};

// The same from global memory, for vectors too wide for shared memory: each warp reads only its own columns.
struct GlobalX {
  const u8* base;
  bool active;

  template <int cols>
  __device__ static GlobalX make(const Cta& cta, const u8* source) {
    const int token = cta.lane / 4;
    return {source + token * x_row_bytes(padded(cols)) + cta.lane % 4 * 8, token < cta.args.num_rows};
  }
  __device__ __forceinline__ uint2 operator()(int fragment) const {
    if (!active) return make_uint2(0, 0);
    return ld_cg_8(base + fragment * 32);
  }
};

// Epilogue(tile, row, token, i, sum): called for the 16 rows x num_rows tokens of a tile by one warp: row = lane % 16,
// token = lane / 16 + 2 i. All lanes call it together, also for a token equal to num_rows.
template <int cols, class X, class Epilogue>
__device__ __forceinline__ void matvec(Cta& cta, RingReader& ring, const Tiles<cols>& tiles, const X& x,
                                       Epilogue&& epilogue) {
  using T = Tiles<cols>;
  constexpr int n = T::warp_fragments;
  const int num_rows = cta.args.num_rows;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    float acc[2][4] = {};
    for (int chunk = 0; chunk < T::num_chunks; ++chunk) {
      const int base = chunk * T::chunk_fragments;
      const int count = min(T::chunk_fragments, T::fragments - base);
      const int first = cta.warp * n;
      uint2 b[n];
#pragma unroll
      for (int j = 0; j < n; ++j) b[j] = first + j < count ? x(base + first + j) : make_uint2(0, 0);
      const u8* slot = ring.wait() + cta.lane * 16;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (first + j < count) mma(acc[j % 2], *reinterpret_cast<const Vec16*>(slot + (first + j) * 512), b[j]);
      }
      ring.release();
    }
    // Even and odd blocks, then the warps in order: always the same additions.
    float* red = cta.shared.red[(tile - tiles.begin) % 2][cta.warp];
    const int row = cta.lane / 4;
    const int token = cta.lane % 4 * 2;
    if (token < num_rows) {
      red[token * red_stride + row] = acc[0][0] + acc[1][0];
      red[token * red_stride + row + 8] = acc[0][2] + acc[1][2];
    }
    if (token + 1 < num_rows) {
      red[(token + 1) * red_stride + row] = acc[0][1] + acc[1][1];
      red[(token + 1) * red_stride + row + 8] = acc[0][3] + acc[1][3];
    }
    cta.consumer_sync();
    if (cta.warp == tile % num_consumer_warps) {
#pragma unroll
      for (int i = 0; i < max_rows / 2; ++i) {
        if (2 * i >= num_rows) break;
        const int t = cta.lane / 16 + 2 * i;
        float sum = 0;
        if (t < num_rows) {
#pragma unroll
          for (int w = 0; w < num_consumer_warps; ++w) {
            sum += cta.shared.red[(tile - tiles.begin) % 2][w][t * red_stride + cta.lane % 16];
          }
        }
        epilogue(tile, cta.lane % 16, t, i, sum);
      }
    }
  }
}
