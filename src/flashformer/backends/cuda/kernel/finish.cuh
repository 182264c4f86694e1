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

// What the sums of a stage are multiplied by, for the tokens whose sums a lane has: nothing.
template <class S, bool normed = S::normed>
struct NormFactors {
  __device__ __forceinline__ explicit NormFactors(const Cta&) {}
  __device__ __forceinline__ float apply(int, float sum) const { return sum; }
};

// Behind a norm 1 / rms of each token's hidden state, from the squares that the warps have left.
template <class S>
struct NormFactors<S, true> {
  using TheSums = Sums<typename S::F>;
  float factor[TheSums::num_tokens];

  __device__ __forceinline__ explicit NormFactors(const Cta& cta) {
#pragma unroll
    for (int i = 0; i < TheSums::num_tokens; ++i) {
      const int token = min(TheSums::token(cta.lane, i), max_rows - 1);  // what it is for others reaches nobody
      const float4 a = reinterpret_cast<const float4*>(cta.shared.squares[token])[0];
      const float4 b = reinterpret_cast<const float4*>(cta.shared.squares[token])[1];
      const float sum = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
      constexpr float scale = config::exchange_scale;
      constexpr float share = 1.f / (scale * scale * config::hidden_size);
      factor[i] = rsqrtf(sum * share + config::rms_norm_eps) * (1.f / scale);
    }
  }
  __device__ __forceinline__ float apply(int i, float sum) const { return sum * factor[i]; }
};

// A consumer warp's sums of the tile.
template <class S>
__device__ __forceinline__ void send_part(const Cta& cta, const Parts& parts, const Sums<typename S::F>& sums, int part,
                                          const NormFactors<S>& factors) {
  const int buffer = parts.buffer();
  cta.wait(shared_address(&cta.shared.part_free[buffer]), parts.free_parity(), WaitKind::part_free);
  sums.leave(cta, cta.shared.part[buffer][part], factors);
  if constexpr (S::F::row_scale_bytes > 0) {
    if (part == S::last_part && cta.lane < tile_rows) cta.shared.row_scale[buffer][cta.lane] = sums.row_scale;
  }
  __syncwarp();
  mbarrier_arrive_warp<part_arrivals / S::num_parts>(shared_address(&cta.shared.part_ready[buffer]), cta.lane);
}

// The finishing warp's sums of a tile. Lane: row lane % 16, tokens lane / 16 + 2 i; of one token the second half of the
// warp has the next tile, if `num_tiles` is 2.
template <class S>
struct TileSums {
  static constexpr int num = (max_rows + 1) / 2;
  float token[num];

  __device__ __forceinline__ TileSums(const Cta& cta, Parts& parts, int num_tiles) {
    const int half = cta.lane / tile_rows;
    Parts next = parts;
    if (num_tiles == 2) ++next.tile;
    await(cta, parts);
    if (num_tiles == 2) await(cta, next);
    const int buffer = half == 1 && tiles_finished == 2 ? next.buffer() : parts.buffer();
    const float* part = cta.shared.part[buffer][0] + (max_rows > 1 ? half : 0) * part_stride + cta.lane % tile_rows;
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
    mbarrier_arrive_warp<1>(shared_address(&cta.shared.part_free[parts.buffer()]), cta.lane);
    if (num_tiles == 2) mbarrier_arrive_warp<1>(shared_address(&cta.shared.part_free[next.buffer()]), cta.lane);
    parts.tile += num_tiles;
  }

 private:
  static __device__ __forceinline__ void await(const Cta& cta, const Parts& parts) {
    cta.wait(shared_address(&cta.shared.part_ready[parts.buffer()]), parts.ready_parity(), WaitKind::part_ready);
  }
};
