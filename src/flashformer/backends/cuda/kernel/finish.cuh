// The end of a tile: each warp leaves the sums of its columns in shared memory, the finishing warp adds them in a fixed
// order and does with the 16 sums what the stage is for, while the consumers go on with the next tile.
#pragma once
#include "multiply.cuh"

// Where the parts of the next tile lie, and the parities of its barriers. Both sides count the same tiles.
struct Parts {
  u32 tile = 0;

  __device__ __forceinline__ int buffer() const { return tile % num_part_buffers; }
  __device__ __forceinline__ u32 ready_parity() const { return tile / num_part_buffers & 1; }
  __device__ __forceinline__ u32 free_parity() const { return ready_parity() ^ 1; }
};

// A consumer warp's sums of the tile.
template <class S>
__device__ __forceinline__ void send_part(const Cta& cta, const Parts& parts, const Sums<typename S::F>& sums,
                                          int part) {
  const int buffer = parts.buffer();
  cta.wait(&cta.shared.part_free[buffer], parts.free_parity(), WaitKind::part_free);
  sums.leave(cta, cta.shared.part[buffer][part]);
  if constexpr (S::F::row_scale_bytes > 0) {
    if (part == S::last_part && cta.lane < tile_rows) cta.shared.row_scale[buffer][cta.lane] = sums.row_scale;
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
      if constexpr (S::F::row_scale_bytes > 0) token[i] *= cta.shared.row_scale[buffer][cta.lane % tile_rows];
    }
    __syncwarp();
    mbarrier_arrive_warp<1>(&cta.shared.part_free[buffer], cta.lane);
  }
};
