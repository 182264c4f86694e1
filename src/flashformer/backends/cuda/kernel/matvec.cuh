// Tiles of 16 rows times the activations of 1 to 8 tokens: who multiplies what.
//
// Four warps share a slot of the ring, and two slots are multiplied at once; finish.cuh adds the warps' sums in a fixed
// order: a token's result depends neither on the other tokens nor on the time of day.
#pragma once
#include "fetch.cuh"
#include "finish.cuh"

template <Kind kind, class Sink>
__device__ __forceinline__ void stream_tiles(Sink& sink, int layer) {
  using S = Stage<kind>;
  const u8* matrix = sink.cta.args.image + S::offset(layer);
  const int cta_idx = sink.cta.idx;
  for_each_pass<S>(S::count(cta_idx), [&](int i, int first, int end) {
    const u8* source = matrix + static_cast<u64>(S::begin(cta_idx) + i) * S::tile_bytes;
#pragma unroll 1
    for (int chunk = first; chunk < end; ++chunk) sink.fill(source + chunk * S::chunk_bytes, S::bytes_of(chunk));
  });
  sink.trace(moment_of(Moment::qkv_fill, kind), layer);
}

// This warp's part of the work on a stage's tiles: of every slots_at_once-th chunk its share of the runs.
template <class S>
struct Share {
  using F = typename S::F;
  int chunk;    // the first of a tile, for the first tile
  int lead;     // 0: takes the first runs of a chunk, 1: the next, ...

  __device__ __forceinline__ explicit Share(const Cta& cta)
      : chunk(cta.warp / warps_a_slot), lead(cta.warp % warps_a_slot) {}

  // This warp's first chunk of the CTA's `tile`-th tile; S::num_chunks: none.
  __device__ __forceinline__ int first_chunk(int tile) const {
    if constexpr (S::num_chunks >= slots_at_once) return (chunk - tile * S::turn) & (slots_at_once - 1);
    return chunk / S::num_chunks == tile % S::tiles_at_once ? chunk % S::num_chunks : S::num_chunks;
  }
  // The same from chunk `at` on.
  __device__ __forceinline__ int first_chunk(int tile, int at) const {
    const int first = first_chunk(tile);
    return first + ceil_div(max(at - first, 0), slots_at_once) * slots_at_once;
  }
  __device__ __forceinline__ int part(int tile) const {
    return first_chunk(tile) % S::chunks_at_once * warps_a_slot + lead;
  }
  // x: the lane's part of the activations, from the tile's first run on.
  template <class Operand>
  __device__ __forceinline__ void multiply(const Cta& cta, Sums<F>& sums, const u8* slot, const Operand& x, int c) const {
    const Operand at = x.from(c * S::chunk_runs);
    if ((S::last_runs == S::chunk_runs && S::last_blocks == F::run_blocks) || c < S::num_chunks - 1) {
      multiply_share<S::chunk_runs, F::run_blocks>(cta, sums, slot, at);
    } else {
      multiply_share<S::last_runs, S::last_blocks>(cta, sums, slot, at);
    }
    if constexpr (F::row_scale_bytes > 0) {
      if (c == S::num_chunks - 1) sums.load_row_scale(cta, slot + S::last_bytes - F::row_scale_bytes);
    }
  }

 private:
  // last_blocks: of the chunk's last run.
  template <int count, int last_blocks, class Operand>
  __device__ __forceinline__ void multiply_share(const Cta& cta, Sums<F>& sums, const u8* slot, const Operand& x) const {
    constexpr int most = ceil_div(count, warps_a_slot);
    constexpr int last = (count - 1) / most;  // who has the last run; whoever comes behind has none
    const u8* first = slot + lead * most * F::run_bytes;
    const Operand at = x.from(lead * most);
    if ((count == most * warps_a_slot && last_blocks == F::run_blocks) || lead < last) {
      multiply_runs<F, most, F::run_blocks>(cta, sums, first, at);
    } else if (lead == last) {
      multiply_runs<F, count - last * most, last_blocks>(cta, sums, first, at);
    }
  }
};

// This warp's chunks of one tile from `first` on, before `end`. The ring is at chunk `at` and ends up at `end`; once it is
// lost it stays where it is.
template <class S, class Operand>
__device__ __forceinline__ void multiply_tile(const Cta& cta, RingReader& ring, const Share<S>& share,
                                              Sums<typename S::F>& sums, const Operand& x, int first, int at, int end) {
  if (ring.is_lost()) return;
  if (first >= end) return ring.skip(end - at);
  ring.skip(first - at);
#pragma unroll 1
  for (int chunk = first; chunk < end; chunk += slots_at_once) {
    const u8* slot = ring.wait();
    share.multiply(cta, sums, slot, x, chunk);  // of a lost ring whatever lies there: nobody needs the sums
    ring.release<num_consumer_warps / warps_a_slot>();
    ring.skip(min(slots_at_once, end - chunk));
  }
}

// All of a CTA's tiles; the activations lie complete in shared memory.
template <class S>
__device__ __forceinline__ void matvec(const Cta& cta, RingReader& ring, Parts& parts) {
  const Operand<typename S::F, typename S::X> x(cta, cta.x);
  const Share<S> share(cta);
  const NormFactors<S> factors(cta);
  const int num_tiles = S::count(cta.idx);
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile, ++parts.tile) {
    Sums<typename S::F> sums;
    const int first = share.first_chunk(tile);
    multiply_tile(cta, ring, share, sums, x, first, 0, S::num_chunks);
    if (first < S::num_chunks) send_part<S>(cta, parts, sums, share.part(tile), factors);
  }
}

// The same where the last columns of the activations come late: `load_x` has brought the others.
template <class S>
__device__ __forceinline__ void matvec_in_two(const Cta& cta, RingReader& ring, const u8* buffer, u32 tag, Parts& parts) {
  using F = typename S::F;
  using Late = Fetch<S::cols, S::X::packets - S::early_packets>;
  // Packets are on their way while the others are used, where registers are left for them.
  constexpr bool early = Late::batches == 1 && config::arch >= 90 && max_rows <= 2;
  const Operand<F, typename S::X> x(cta, cta.x);
  const Share<S> share(cta);
  const int num_tiles = S::count(cta.idx);
  Late late(cta, buffer, tag, S::early_packets);
  if (early && num_tiles > 0) late.issue(cta);
#pragma unroll 1
  for (int group = 0; group < num_tiles; group += S::group) {
    Sums<F> sums[S::group];
#pragma unroll 1
    for (int window = 0; window < 2; ++window) {
      // Or a warp might wait for the fill after next (tests/test_cuda_ring.py).
      if (S::num_chunks % 2 == 1 && group > 0) cta.consumer_sync();
      if (group == 0 && window == 1) late.template load<F, typename S::X>(cta, cta.x, S::early_packets, early, [] {});
      const int at = window * S::window_chunks;
      const int end = window == 0 ? S::window_chunks : S::num_chunks;
#pragma unroll
      for (int i = 0; i < S::group; ++i) {
        if (group + i >= num_tiles) break;
        multiply_tile(cta, ring, share, sums[i], x, share.first_chunk(group + i, at), at, end);
      }
    }
#pragma unroll
    for (int i = 0; i < S::group; ++i) {
      if (group + i >= num_tiles) break;
      send_part<S>(cta, parts, sums[i], share.part(group + i), NormFactors<S>(cta));
      ++parts.tile;
    }
  }
}

// The same with activations that come window by window; the next window is fetched while one is used.
template <class S>
__device__ __forceinline__ void matvec_windows(const Cta& cta, RingReader& ring, const u8* buffer, u32 tag,
                                               Parts& parts) {
  using F = typename S::F;
  constexpr int window_runs = S::window_chunks * S::chunk_runs;
  using X = Rows<F, window_runs>;
  // Packets are on their way while a window is used, where registers are left for them.
  constexpr bool early = F::bits == 16 || (config::arch >= 90 && (F::integer || max_rows < 8));
  const Share<S> share(cta);
  const int num_tiles = S::count(cta.idx);
#pragma unroll 1
  for (int group = 0; group < num_tiles; group += S::group) {
    Sums<F> sums[S::group];
#pragma unroll 1
    for (int window = -1; window < S::num_windows; ++window) {
      Fetch<S::cols, X::packets> fetch(cta, buffer, tag, (window + 1) * X::packets);
      if (early) fetch.issue(cta);
      const int at = window * S::window_chunks;
      const int end = window < 0 ? at : min(at + S::window_chunks, S::num_chunks);
      const Operand<F, X> first_run(cta, cta.x + (window & 1) * (max_rows * X::stride));
      const Operand<F, X> x = first_run.from(-at * S::chunk_runs);
#pragma unroll
      for (int i = 0; i < S::group; ++i) {
        if (group + i >= num_tiles) break;
        multiply_tile(cta, ring, share, sums[i], x, share.first_chunk(group + i, at), at, end);
      }
      if (!early) fetch.issue(cta);
      fetch.await(cta);
      if (group == 0 && window < 0) cta.consumer_sync();  // every warp has left the activations of the stage before
      fetch.template store<F, X>(cta, cta.x + (window + 1) % 2 * (max_rows * X::stride));
      cta.consumer_sync();
    }
#pragma unroll
    for (int i = 0; i < S::group; ++i) {
      if (group + i >= num_tiles) break;
      send_part<S>(cta, parts, sums[i], share.part(group + i), NormFactors<S>(cta));
      ++parts.tile;
    }
  }
}
