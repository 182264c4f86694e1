// Tiles of 16 rows times the activations of 1 to 8 tokens, on the tensor cores.
//
// Weights are operand A in fragment order (quant/layout.py), tokens the 8 columns of operand B. Two warps share a slot
// of the ring, and four slots are multiplied at once; finish.cuh adds the warps' sums in a fixed order: a token's result
// depends neither on the other tokens nor on the time of day.
#pragma once
#include "fetch.cuh"
#include "finish.cuh"

__device__ __forceinline__ void mma(float (&acc)[4], const Vec16& a, uint2 b) {
  if constexpr (config::weights_f16) {
    mma_f16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  } else {
    mma_bf16(acc, a.w[0], a.w[1], a.w[2], a.w[3], b.x, b.y);
  }
}

template <Kind kind, class Sink>
__device__ __forceinline__ void stream_tiles(Sink& sink, int layer) {
  using S = Stage<kind>;
  const u8* matrix = sink.cta.args.image + S::offset(layer);
  const int cta_idx = sink.cta.idx;
  for_each_pass<S>(S::begin(cta_idx), S::end(cta_idx), [&](int tile, int first, int end) {
    const u8* source = matrix + static_cast<u64>(tile) * S::tile_bytes;
#pragma unroll 1
    for (int chunk = first; chunk < end; ++chunk) sink.fill(source + chunk * S::chunk_bytes, S::bytes_of(chunk));
  });
  sink.trace(moment_of(Moment::qkv_fill, kind), layer);
}

// The lane's parts of operands A and B of some neighbouring fragments.
struct Fragments {
  static constexpr int num = config::arch >= 90 ? 4 : 1;  // without bulk copies the producer needs more registers
  Vec16 a[num];
  uint2 b[num];

  __device__ __forceinline__ void load(const u8* slot, const u8* x, int first, int end, bool active) {
#pragma unroll
    for (int i = 0; i < num; ++i) {
      if (first + i >= end) continue;
      a[i] = *reinterpret_cast<const Vec16*>(slot + (first + i) * 512);
      if (active) b[i] = *reinterpret_cast<const uint2*>(x + (first + i) * 32);
    }
  }
  __device__ __forceinline__ void multiply(Sums& sums, int first, int end) const {
#pragma unroll
    for (int i = 0; i < num; ++i) {
      if (first + i < end) mma(sums.chain[i], a[i], b[i]);
    }
  }
};

// `count` fragments of weights times their columns. slot, x: the lane's part of operand A / B at the first of them. The
// next fragments are on their way from shared memory while some are multiplied. What operand B holds in the columns of
// tokens that do not exist reaches nobody, so their lanes load nothing.
template <int count>
__device__ __forceinline__ void multiply_fragments(Sums& sums, const u8* slot, const u8* x, bool active) {
  constexpr int n = Fragments::num;
  Fragments even{}, odd{};
  even.load(slot, x, 0, count, active);
#pragma unroll
  for (int first = 0; first < count; first += 2 * n) {
    odd.load(slot, x, first + n, count, active);
    even.multiply(sums, first, count);
    even.load(slot, x, first + 2 * n, count, active);
    odd.multiply(sums, first + n, count);
  }
}

// This warp's part of the work on a stage's tiles: of every slots_at_once-th chunk its share of the fragments.
template <class S>
struct Share {
  static constexpr int most = ceil_div(S::chunk_fragments, warps_a_slot);  // fragments of a whole chunk
  int chunk;    // the first of a tile, for the first tile
  int lead;     // 0: takes the first fragments of a chunk, 1: the rest
  bool active;  // whether the lane has a token

  __device__ __forceinline__ explicit Share(const Cta& cta)
      : chunk(cta.warp / warps_a_slot), lead(cta.warp % warps_a_slot), active(cta.lane / 4 < cta.args.num_rows) {}

  // This warp's first chunk of the CTA's `tile`-th tile; S::num_chunks: none.
  __device__ __forceinline__ int first_chunk(int tile) const {
    if constexpr (S::num_chunks >= slots_at_once) return (chunk - tile * S::num_chunks) & (slots_at_once - 1);
    return chunk / S::num_chunks == tile % S::tiles_at_once ? chunk % S::num_chunks : S::num_chunks;
  }
  __device__ __forceinline__ int part(int tile) const {
    return first_chunk(tile) % S::chunks_at_once * warps_a_slot + lead;
  }
  __device__ __forceinline__ void multiply(Sums& sums, const u8* slot, const u8* x, int c) const {
    constexpr int last = S::last_fragments;
    constexpr int last_most = ceil_div(last, warps_a_slot);
    if (last == S::chunk_fragments || c < S::num_chunks - 1) {
      multiply_half<S::chunk_fragments, most>(sums, slot, x);
    } else {
      multiply_half<last, last_most>(sums, slot, x);
    }
  }

 private:
  template <int count, int first>
  __device__ __forceinline__ void multiply_half(Sums& sums, const u8* slot, const u8* x) const {
    if constexpr (count == 2 * first) {
      multiply_fragments<first>(sums, slot + lead * first * 512, x + lead * first * 32, active);
    } else if (lead == 0) {
      multiply_fragments<first>(sums, slot, x, active);
    } else {
      multiply_fragments<count - first>(sums, slot + first * 512, x + first * 32, active);
    }
  }
};

// This warp's chunks of one tile from `first` on, before `end`. The ring is at chunk `at` and ends up at `end`; x is the
// lane's part of operand B at chunk 0.
template <class S>
__device__ __forceinline__ void multiply_tile(const Cta& cta, RingReader& ring, const Share<S>& share, Sums& sums,
                                              const u8* x, int first, int at, int end) {
  if (first >= end) return ring.skip(end - at);
  ring.skip(first - at);
#pragma unroll 1
  for (int chunk = first; chunk < end; chunk += slots_at_once) {
    const u8* slot = ring.wait() + cta.lane * 16;
    share.multiply(sums, slot, x + chunk * S::chunk_fragments * 32, chunk);
    ring.release<num_consumer_warps / warps_a_slot>();
    ring.skip(min(slots_at_once, end - chunk));
  }
}

// The lane's part of operand B in rows of activations.
__device__ __forceinline__ u32 lane_offset(const Cta& cta, int row_stride) {
  return cta.lane / 4 * row_stride + cta.lane % 4 * 8;
}

// All of a CTA's tiles; the activations lie complete in shared memory.
template <class S>
__device__ __forceinline__ void matvec(const Cta& cta, RingReader& ring, Parts& parts) {
  const u8* x = cta.x + lane_offset(cta, x_row_stride(S::cols));
  const Share<S> share(cta);
  const int num_tiles = S::end(cta.idx) - S::begin(cta.idx);
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile, ++parts.tile) {
    Sums sums;
    const int first = share.first_chunk(tile);
    multiply_tile(cta, ring, share, sums, x, first, 0, S::num_chunks);
    if (first < S::num_chunks) send_part<S>(cta, parts, sums, share.part(tile));
  }
}

// The same with activations that come window by window; the next window is fetched while one is used.
template <class S>
__device__ __forceinline__ void matvec_windows(const Cta& cta, RingReader& ring, const u8* buffer, u32 tag,
                                               Parts& parts) {
  constexpr int window_fragments = S::window_chunks * S::chunk_fragments;
  constexpr u32 stride = window_fragments * 32 + 32;
  const u8* lane_x = cta.x + lane_offset(cta, stride);
  const Share<S> share(cta);
  const int num_tiles = S::end(cta.idx) - S::begin(cta.idx);
#pragma unroll 1
  for (int group = 0; group < num_tiles; group += S::group) {
    Sums sums[S::group];
#pragma unroll 1
    for (int window = -1; window < S::num_windows; ++window) {
      Fetch<S::cols, window_fragments> fetch(cta, buffer, tag, (window + 1) * window_fragments);
      fetch.issue(cta);
      const int at = window * S::window_chunks;
      const int end = window < 0 ? at : min(at + S::window_chunks, S::num_chunks);
      const u8* x = lane_x + (window & 1) * (max_rows * stride) - at * S::chunk_fragments * 32;
#pragma unroll
      for (int i = 0; i < S::group; ++i) {
        if (group + i >= num_tiles) break;
        const int first = share.first_chunk(group + i);
        const int rounds = ceil_div(max(at - first, 0), slots_at_once);
        multiply_tile(cta, ring, share, sums[i], x, first + rounds * slots_at_once, at, end);
      }
      fetch.await(cta);
      if (group == 0 && window < 0) cta.consumer_sync();  // every warp has left the activations of the stage before
      fetch.store(cta, cta.x + (window + 1) % 2 * (max_rows * stride), stride);
      cta.consumer_sync();
    }
#pragma unroll
    for (int i = 0; i < S::group; ++i) {
      if (group + i >= num_tiles) break;
      send_part<S>(cta, parts, sums[i], share.part(group + i));
      ++parts.tile;
    }
  }
}
