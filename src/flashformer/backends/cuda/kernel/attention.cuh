// Decode attention over paged keys and values, split over all CTAs.
//
// A unit's pages come through the ring before its query exists. All query heads of the kv head are the 16 rows of
// operand A. Four warps share a page, the other four the next; each takes 16 positions at a time with its own running
// maximum (online softmax, Milakov & Gimelshein 2018); the warps, then the chunks (chunks.cuh), are merged in a fixed
// order.
#pragma once
#include "heads.cuh"

// Operand A's rows 8 to 15 exist only for groups of more than 8 query heads.
constexpr int halves = config::group > 8 ? 2 : 1;

// D's registers 0, 1: row lane / 4; 2, 3: row lane / 4 + 8.
__device__ __forceinline__ void mma_heads(float (&d)[2 * halves], const u32 (&a)[4], u32 b0, u32 b1) {
  float full[4] = {d[0], d[1], 0, 0};
  if constexpr (halves == 2) {
    full[2] = d[2];
    full[3] = d[3];
  }
  mma_bf16(full, a[0], halves == 2 ? a[1] : 0, a[2], halves == 2 ? a[3] : 0, b0, b1);
#pragma unroll
  for (int i = 0; i < 2 * halves; ++i) d[i] = full[i];
}

// The bits of two neighbouring positions that are visible. What lies in a page beyond them may be another sequence's
// NaN, and zero times NaN is NaN.
__device__ __forceinline__ u32 visible_pair(int position, int lo, int hi) {
  const bool first = position >= lo && position < hi;
  const bool second = position + 1 >= lo && position + 1 < hi;
  return (first ? 0xffffu : 0u) | (second ? 0xffff0000u : 0u);
}

// Two chains of products for each half of a block's positions hide half of the tensor core's latency. As many for any number
// of rows: the order of a sum is part of its bits.
constexpr int score_chains = config::arch >= 90 ? 2 : 1;
// Values that are asked for before the softmax, where registers are left.
constexpr int early_values = config::arch >= 90 && max_rows == 1 ? least(dim_blocks, 4) : 0;

// A warp's running attention over blocks of 16 positions. Lane: query head lane / 4 (and + 8), positions by lane % 4.
struct WarpAttention {
  float maximum[halves];
  float sum[halves];
  float out[2 * dim_blocks][2 * halves] = {};

  __device__ WarpAttention() {
    for (int h = 0; h < halves; ++h) {
      maximum[h] = -infinity;
      sum[h] = 0;
    }
  }

  // keys, values: one block each, [dim_blocks][512]; positions first.. of the block are visible while in [lo, hi).
  __device__ __forceinline__ void block(const u8* query, const u8* keys, const u8* values, int lane, int first, int lo,
                                        int hi) {
    float chain[score_chains][2][2 * halves] = {};
#pragma unroll(score_chains)
    for (int d = 0; d < dim_blocks; ++d) {
      const Vec16 a = *reinterpret_cast<const Vec16*>(query + d * 512 + lane * 16);
      const Vec16 b = *reinterpret_cast<const Vec16*>(keys + d * 512 + lane * 16);
      mma_heads(chain[d % score_chains][0], a.w, b.w[0], b.w[1]);
      mma_heads(chain[d % score_chains][1], a.w, b.w[2], b.w[3]);
    }
    float(&score)[2][2 * halves] = chain[0];
#pragma unroll
    for (int c = 1; c < score_chains; ++c) {
#pragma unroll
      for (int i = 0; i < 2 * halves; ++i) {
        score[0][i] += chain[c][0][i];
        score[1][i] += chain[c][1][i];
      }
    }
    Vec16 early[early_values > 0 ? early_values : 1];
#pragma unroll
    for (int d = 0; d < early_values; ++d) early[d] = *reinterpret_cast<const Vec16*>(values + d * 512 + lane * 16);
    u32 p[4] = {};
#pragma unroll
    for (int h = 0; h < halves; ++h) {
      float top = maximum[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
        float& s = score[i / 2][2 * h + i % 2];
        if (position < lo || position >= hi) s = -infinity;
        top = fmaxf(top, s);
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shift = top == -infinity ? 0.f : top;  // nothing visible yet: all weights are 2^-inf = 0
      const float scale = ex2(maximum[h] - shift);
      maximum[h] = top;
      float added = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = score[i / 2][2 * h + i % 2];
        s = ex2(s - shift);
        added += s;
      }
      sum[h] = sum[h] * scale + added;
      p[h] = cvt_bf16x2(score[0][2 * h], score[0][2 * h + 1]);
      p[2 + h] = cvt_bf16x2(score[1][2 * h], score[1][2 * h + 1]);
#pragma unroll
      for (int n = 0; n < 2 * dim_blocks; ++n) {
        out[n][2 * h] *= scale;
        out[n][2 * h + 1] *= scale;
      }
    }
    const int position = first + lane % 4 * 2;
    const u32 keep[2] = {visible_pair(position, lo, hi), visible_pair(position + 8, lo, hi)};
#pragma unroll
    for (int d = 0; d < dim_blocks; ++d) {
      Vec16 b = d < early_values ? early[d] : *reinterpret_cast<const Vec16*>(values + d * 512 + lane * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) b.w[i] &= keep[i % 2];
      mma_heads(out[2 * d], p, b.w[0], b.w[1]);
      mma_heads(out[2 * d + 1], p, b.w[2], b.w[3]);
    }
  }
};

// Merge the warps in order; write(head, dim, values, maximum, sum) gets the unit's unnormalised sums of two neighbouring
// dims. Whole warps call it, groups of four lanes with eight neighbouring dims of one head; from head_dim on there is nothing
// to write.
template <class Write>
__device__ __forceinline__ void merge_warps(const Cta& cta, const AttentionScratch& scratch, WarpAttention& own,
                                            Write&& write) {
#pragma unroll
  for (int h = 0; h < halves; ++h) {
    own.sum[h] += __shfl_xor_sync(~0u, own.sum[h], 1);
    own.sum[h] += __shfl_xor_sync(~0u, own.sum[h], 2);
    if (cta.lane % 4 == 0) {
      float2* stats = reinterpret_cast<float2*>(scratch.stats) + cta.warp * 16 + cta.lane / 4 + 8 * h;
      *stats = make_float2(own.maximum[h], own.sum[h]);
    }
  }
#pragma unroll
  for (int first = 0; first < head_dim_padded; first += output_dims) {
#pragma unroll
    for (int n = 0; n < output_dims / 8; ++n) {
      if (first / 8 + n >= 2 * dim_blocks) continue;
#pragma unroll
      for (int h = 0; h < halves; ++h) {
        const int head = cta.lane / 4 + h * 8;
        float* to = scratch.output + (cta.warp * config::group + head) * output_stride + n * 8 + cta.lane % 4 * 2;
        const float(&out)[2 * halves] = own.out[first / 8 + n];
        if (head < config::group) *reinterpret_cast<float2*>(to) = make_float2(out[2 * h], out[2 * h + 1]);
      }
    }
    cta.consumer_sync();
    constexpr int head_pairs = output_dims / 2;
    constexpr int pairs = config::group * head_pairs;
    for (int pair = cta.thread; pair < (pairs + 31) / 32 * 32; pair += num_consumers) {
      const int head = min(pair, pairs - 1) / head_pairs;
      const int dim = min(pair, pairs - 1) % head_pairs * 2;
      float2 stats[num_consumer_warps];
      float top = -infinity;
#pragma unroll
      for (int w = 0; w < num_consumer_warps; ++w) {
        stats[w] = reinterpret_cast<const float2*>(scratch.stats)[w * 16 + head];
        top = fmaxf(top, stats[w].x);
      }
      float total = 0;
      float2 sum{};
#pragma unroll
      for (int w = 0; w < num_consumer_warps; ++w) {
        const float* part = scratch.output + (w * config::group + head) * output_stride + dim;
        const float2 value = *reinterpret_cast<const float2*>(part);
        const float factor = stats[w].x == -infinity ? 0.f : ex2(stats[w].x - top);
        total += factor * stats[w].y;
        sum.x += factor * value.x;
        sum.y += factor * value.y;
      }
      write(head, pair < pairs ? first + dim : config::head_dim, sum, top, total);
    }
    cta.consumer_sync();
  }
}

// Where the step's own positions, a block beside the pages, take their turn: with a warp for which the chunk's last page
// has no positions, or in a round of their own.
struct OwnBlock {
  int page;
  int block = 0;

  __device__ __forceinline__ OwnBlock(const RowPast& past, int begin, int end) : page(end) {
    if (end == begin) return;
    const int blocks = ceil_div(past.base - (past.first_page + end - 1) * config::page_tokens, 16);
    if (blocks >= warps_a_page) return;
    page = end - 1;
    block = blocks;
  }
};

__device__ __forceinline__ void attention(const Cta& cta, RingReader& ring, const Exchange& exchange, int layer,
                                          int step, u32 tag) {
  const AttentionScratch scratch(cta.x);
  const int window = layer_table[layer].window;
  const bool chunked = for_each_unit(cta, step, window, [&](int row, const RowPast& past, int kv_head, int chunk) {
    const bool with_own = chunk == past.num_chunks - 1;
    const UnitHeads heads(cta, exchange, layer, step, row, kv_head, with_own);
    prepare_unit(cta, heads, layer_table[layer].rope_idx, tag);
    WarpAttention sums;
    const int begin = chunk * past.chunk_pages;
    const int end = min(past.num_pages, (chunk + 1) * past.chunk_pages);
    const OwnBlock own(past, begin, end);
    const int block = cta.warp % warps_a_page;
#pragma unroll 1
    for (int page = begin; page < end + (with_own && own.page == end); ++page) {
      const bool stored = page < end;
      if (page % 2 != cta.warp / warps_a_page) {
        if (stored) ring.skip(2);
        continue;
      }
      const u8* keys = nullptr;
      const u8* values = nullptr;
      if (stored) {
        RingReader second = ring;
        second.skip(1);
        keys = ring.wait() + block * dim_blocks * 512;
        values = second.wait() + block * dim_blocks * 512;
      }
      int first = (past.first_page + page) * config::page_tokens + block * 16;
      int hi = past.base;
      bool is_visible = stored && block < page_blocks && first < hi;
      if (with_own && page == own.page && block == own.block) {
        keys = scratch.keys;
        values = scratch.values;
        first = past.base;
        hi = cta.args.positions[row] + step + 1;
        is_visible = true;
      }
      if (is_visible) sums.block(scratch.query, keys, values, cta.lane, first, past.first, hi);
      if (stored) {
        ring.release<num_consumer_warps / warps_a_page>();
        ring.skip(1);
        ring.release<num_consumer_warps / warps_a_page>();
        ring.skip(1);
      }
    }
    u8* out = exchange.attention + row * x_row_bytes(config::q_rows);
    merge_warps(cta, scratch, sums, [&](int group_head, int dim, float2 sum, float top, float total) {
      const int head = kv_head * config::group + group_head;
      if (past.num_chunks == 1) {
        const float2 value = make_float2(__fdividef(sum.x, total), __fdividef(sum.y, total));
        send_half_pairs(cta, out + (head * config::head_dim + dim) * 2, value, tag, dim < config::head_dim);
      } else if (dim < config::head_dim) {
        send_partial(partial_at(exchange, row, head, chunk), dim, sum, top, total, epoch_of(cta, step, layer));
      }
    });
  });
  if (chunked) merge_chunks(cta, step, layer, tag);
}
