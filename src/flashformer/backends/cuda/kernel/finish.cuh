// The end of a tile: each warp leaves the sums of its columns in shared memory, the finishing warp adds them in a fixed
// order and does with the 16 sums what the stage is for, while the consumers go on with the next tile.
#pragma once
#include "packet.cuh"
#include "stages.cuh"

// Where the parts of the next tile lie, and the parities of its barriers. Both sides count the same tiles.
struct Parts {
  u32 tile = 0;

  __device__ __forceinline__ int buffer() const { return tile % num_part_buffers; }
  __device__ __forceinline__ u32 ready_parity() const { return tile / num_part_buffers & 1; }
  __device__ __forceinline__ u32 free_parity() const { return ready_parity() ^ 1; }
};

// Four chains of sums hide the latency of the tensor core. Lane: row lane / 4 (and + 8), tokens lane % 4 * 2 (and + 1).
struct Sums {
  float chain[4][4] = {};

  __device__ __forceinline__ float total(int i) const {
    return (chain[0][i] + chain[1][i]) + (chain[2][i] + chain[3][i]);
  }
};

// A consumer warp's sums of the tile.
template <class S>
__device__ __forceinline__ void send_part(const Cta& cta, const Parts& parts, const Sums& sums, int part) {
  const int buffer = parts.buffer();
  cta.wait(&cta.shared.part_free[buffer], parts.free_parity(), WaitKind::part_free);
  const int token = cta.lane % 4 * 2;
  float* out = cta.shared.part[buffer][part] + token * part_stride + cta.lane / 4;
  if (token < max_rows) {
    out[0] = sums.total(0);
    out[8] = sums.total(2);
    if constexpr (max_rows > 1) {
      out[part_stride] = sums.total(1);
      out[part_stride + 8] = sums.total(3);
    }
  }
  __syncwarp();
  mbarrier_arrive_warp<part_arrivals / S::num_parts>(&cta.shared.part_ready[buffer], cta.lane);
}

// The finishing warp's sums of the tile. Lane: row lane % 16, tokens lane / 16 + 2 i.
template <class S>
struct TileSums {
  static constexpr int num = (max_rows + 1) / 2;
  float token[num];

  __device__ __forceinline__ TileSums(const Cta& cta, const Parts& parts) {
    const int buffer = parts.buffer();
    cta.wait(&cta.shared.part_ready[buffer], parts.ready_parity(), WaitKind::part_ready);
    const int first = max_rows > 1 ? cta.lane / 16 : 0;
    const float* part = cta.shared.part[buffer][0] + first * part_stride + cta.lane % 16;
#pragma unroll
    for (int i = 0; i < num; ++i) {
      float value[S::num_parts];
#pragma unroll
      for (int p = 0; p < S::num_parts; ++p) value[p] = part[(p * max_rows + 2 * i) * part_stride];
      token[i] = value[0];
#pragma unroll
      for (int p = 1; p < S::num_parts; ++p) token[i] += value[p];
    }
    __syncwarp();
    mbarrier_arrive_warp<1>(&cta.shared.part_free[buffer], cta.lane);
  }
};
