// Decode attention over paged keys and values, split over all CTAs.
//
// A unit's pages come through the ring before its query exists. All query heads of the kv head are the 16 rows of
// operand A. Four warps share a page, the other four the next; each takes 16 positions at a time with its own running
// maximum (online softmax, Milakov & Gimelshein 2018); the warps, then the chunks (chunks.cuh), are merged in a fixed
// order.
#pragma once
#include "chunks.cuh"

constexpr int output_dims = config::group <= 4 ? (head_dim_padded < 128 ? head_dim_padded : 128) : 64;

// In the shared memory of the activations, which nobody needs during attention. backend.py knows its size.
struct AttentionScratch {
  u8* query;     // [dim_blocks][512]: operand A
  u8* keys;      // [dim_blocks][512]: the step's own keys (of the row's sequence), 16 positions from base on
  u8* values;    // likewise
  float* heads;  // [num_consumer_warps][head_dim_padded]
  float* stats;  // [num_consumer_warps][16][2]: maximum, sum
  float* output; // [num_consumer_warps][group][output_dims]

  __device__ explicit AttentionScratch(u8* p)
      : query(p), keys(p + dim_blocks * 512), values(p + 2 * dim_blocks * 512),
        heads(reinterpret_cast<float*>(p + 3 * dim_blocks * 512)), stats(heads + num_consumer_warps * head_dim_padded),
        output(stats + num_consumer_warps * 32) {}
};

// merge_chunks, which comes after the units, takes the same memory.
static_assert(merge_floats <= num_consumer_warps * (head_dim_padded + 32 + config::group * output_dims));

constexpr int head_packets = config::head_dim / 4;
constexpr int packets_a_lane = (head_packets + 31) / 32;

__device__ __forceinline__ u16 bf16_bits(float v) { return static_cast<u16>(cvt_bf16x2(v, 0.f)); }

// One head of q, k or v of one row from its packets; for q and k RMSNorm (if the model has it) and rotary embedding.
struct HeadTask {
  const float* source;  // in the exchange
  const float* norm;    // [head_dim]
  int part;             // 0 query, 1 key, 2 value
  int index;            // head of the group / position after base
  int row;
};

struct HeadPackets {
  Vec16 packet[packets_a_lane];

  __device__ __forceinline__ void fetch(const Cta& cta, const HeadTask& task, u32 tag) {
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = cta.lane + 32 * j;
      if (at >= head_packets) continue;
      packet[j] = ld_relaxed_gpu_b128(task.source + 4 * at);
      if (config::qk_norm && task.part < 2) prefetch(task.norm + 4 * at);  // registers are short
    }
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = cta.lane + 32 * j;
      if (at < head_packets) await_packet<Payload::single>(cta, packet[j], task.source + 4 * at, tag);
    }
  }

  __device__ __forceinline__ void normalise(const Cta& cta, const HeadTask& task) {
    float square = 0;
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      if (cta.lane + 32 * j >= head_packets) continue;
#pragma unroll
      for (u32 word : packet[j].w) square += __uint_as_float(word) * __uint_as_float(word);
    }
    square = warp_sum(square);
    if (task.part == 2) return;  // values
    const float rstd = rsqrtf(square / config::head_dim + config::rms_norm_eps);
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = cta.lane + 32 * j;
      if (at >= head_packets) continue;
      const float4 norm = reinterpret_cast<const float4*>(task.norm)[at];
      const float weight[4] = {norm.x, norm.y, norm.z, norm.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        packet[j].w[e] = __float_as_uint(__uint_as_float(packet[j].w[e]) * (rstd * weight[e]));
      }
    }
  }
};

__device__ __forceinline__ void place_head(const Cta& cta, const AttentionScratch& scratch, const HeadTask& task,
                                           HeadPackets& packets, int rope_idx) {
  if constexpr (config::qk_norm) packets.normalise(cta, task);
  float* head = scratch.heads + cta.warp * head_dim_padded;
#pragma unroll
  for (int j = 0; j < packets_a_lane; ++j) {
    const int at = cta.lane + 32 * j;
    if (at < head_packets) *reinterpret_cast<Vec16*>(head + 4 * at) = packets.packet[j];
  }
  __syncwarp();
  constexpr int half = config::rotary_dim / 2;
  for (int dim = cta.lane; dim < config::head_dim; dim += 32) {
    float value = head[dim];
    if (half > 0 && task.part < 2 && rope_idx >= 0 && dim < config::rotary_dim) {
      const float2 turn = cta.shared.rotation[rope_idx][task.row][dim < half ? dim : dim - half];
      const float other = dim < half ? -head[dim + half] : head[dim - half];
      value = value * turn.x + other * turn.y;
    }
    u8* to;
    if (task.part == 0) {
      value *= config::attention_scale * 1.4426950408889634f;  // exp(x) = 2^(x log2 e)
      const int word = dim % 4 / 2 * 2 + task.index / 8;
      to = scratch.query + dim / 16 * 512 + (task.index % 8 * 4 + dim % 16 / 4) * 16 + word * 4 + dim % 2 * 2;
    } else if (task.part == 1) {
      to = scratch.keys + key_offset(task.index, dim);
    } else {
      to = scratch.values + value_offset(task.index, dim);
    }
    *reinterpret_cast<u16*>(to) = bf16_bits(value);
  }
  __syncwarp();
}

// The i-th of a unit's heads: the query heads of the group, then key and value of each of the step's own positions.
__device__ __forceinline__ HeadTask head_task(const Cta& cta, const float* qkv, int layer, int i, int row, int kv_head,
                                              int num_own) {
  HeadTask task;
  int first;  // row of the qkv projection
  if (i < config::group) {
    task.part = 0;
    task.index = i;
    task.row = row;
    first = (kv_head * config::group + i) * config::head_dim;
  } else {
    task.part = 1 + (i - config::group) % 2;
    task.index = (i - config::group) / 2;
    task.row = row - num_own + 1 + task.index;  // a sequence's positions are consecutive rows, this row's the last
    first = config::q_rows + ((task.part - 1) * config::num_kv_heads + kv_head) * config::head_dim;
  }
  const LayerTable& table = layer_table[layer];
  task.source = qkv + u64(task.row) * padded(config::qkv_rows) + first;
  task.norm = vector_at(cta, task.part == 0 ? table.q_norm : table.k_norm);
  return task;
}

// Query heads of the unit into operand A, and the step's own keys and values into one block of 16 positions. What the
// block holds beyond them is not visible.
// Before sm_90 registers are so short that the exchange comes as a whole: in memory.
__device__ INLINED_WITH_ROOM void prepare_unit(const Cta cta, const AttentionScratch scratch, const Exchange exchange,
                                          int layer, u32 tag, int row, int kv_head, bool with_own) {
  const float* qkv = exchange.qkv;
  const int num_own = with_own ? cta.args.positions[row] - cta.args.bases[row] + 1 : 0;
  const int num_tasks = config::group + 2 * num_own;
  if constexpr (head_dim_padded != config::head_dim) {  // the padding of every head must be finite
    cta.consumer_sync();
    for (int i = cta.thread; i < 3 * dim_blocks * 32; i += num_consumers) {
      reinterpret_cast<Vec16*>(scratch.query)[i] = Vec16{};
    }
  }
#pragma unroll 1
  for (int i = cta.warp; i < max(num_tasks, num_consumer_warps); i += num_consumer_warps) {
    HeadPackets packets;
    if (i < num_tasks) packets.fetch(cta, head_task(cta, qkv, layer, i, row, kv_head, num_own), tag);
    if (i == cta.warp) cta.consumer_sync();  // every warp has left what the scratch held
    if (i >= num_tasks) continue;
    asm volatile("" : "+r"(i));  // the task is derived again, not kept in registers across the barrier
    place_head(cta, scratch, head_task(cta, qkv, layer, i, row, kv_head, num_own), packets, layer_table[layer].rope_idx);
  }
  cta.consumer_sync();
}

// The row's own key and value into its page, for the steps to come (`publish` makes them visible).
__device__ __forceinline__ void append_past(const Cta& cta, const AttentionScratch& scratch, int layer, int step, int row, int kv_head) {
  const int position = cta.args.positions[row] + step;
  const int own = position - (cta.args.bases[row] + step);
  u8* keys = const_cast<u8*>(page_at(cta, layer, cta.shared.own_page[row], kv_head));
  u8* values = keys + page_bytes;
  const int token = position % config::page_tokens;
  for (int dim = cta.thread; dim < head_dim_padded; dim += num_consumers) {
    *reinterpret_cast<u16*>(keys + key_offset(token, dim)) =
        *reinterpret_cast<const u16*>(scratch.keys + key_offset(own, dim));
    *reinterpret_cast<u16*>(values + value_offset(token, dim)) =
        *reinterpret_cast<const u16*>(scratch.values + value_offset(own, dim));
  }
}

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
    float score[2][2 * halves] = {};
#pragma unroll(config::arch >= 90 && max_rows < 4 ? 2 : 1)
    for (int d = 0; d < dim_blocks; ++d) {
      const Vec16 a = *reinterpret_cast<const Vec16*>(query + d * 512 + lane * 16);
      const Vec16 b = *reinterpret_cast<const Vec16*>(keys + d * 512 + lane * 16);
      mma_heads(score[0], a.w, b.w[0], b.w[1]);
      mma_heads(score[1], a.w, b.w[2], b.w[3]);
    }
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
      Vec16 b = *reinterpret_cast<const Vec16*>(values + d * 512 + lane * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) b.w[i] &= keep[i % 2];
      mma_heads(out[2 * d], p, b.w[0], b.w[1]);
      mma_heads(out[2 * d + 1], p, b.w[2], b.w[3]);
    }
  }
};

// Merge the warps in order; write(head, dim, value, maximum, sum) gets the unit's unnormalised sums. Whole warps call it,
// groups of eight lanes with eight neighbouring dims of one head; from head_dim on there is nothing to write.
template <class Write>
__device__ __forceinline__ void merge_warps(const Cta& cta, const AttentionScratch& scratch, WarpAttention& own,
                                            Write&& write) {
#pragma unroll
  for (int h = 0; h < halves; ++h) {
    own.sum[h] += __shfl_xor_sync(~0u, own.sum[h], 1);
    own.sum[h] += __shfl_xor_sync(~0u, own.sum[h], 2);
    if (cta.lane % 4 == 0) {
      float* stats = scratch.stats + (cta.warp * 16 + cta.lane / 4 + 8 * h) * 2;
      stats[0] = own.maximum[h];
      stats[1] = own.sum[h];
    }
  }
#pragma unroll
  for (int first = 0; first < head_dim_padded; first += output_dims) {
#pragma unroll
    for (int n = 0; n < output_dims / 8; ++n) {
      if (first / 8 + n >= 2 * dim_blocks) continue;
#pragma unroll
      for (int i = 0; i < 2 * halves; ++i) {
        const int head = cta.lane / 4 + i / 2 * 8;
        if (head < config::group) {
          scratch.output[(cta.warp * config::group + head) * output_dims + n * 8 + cta.lane % 4 * 2 + i % 2] =
              own.out[first / 8 + n][i];
        }
      }
    }
    cta.consumer_sync();
    constexpr int outputs = config::group * output_dims;
    for (int output = cta.thread; output < (outputs + 31) / 32 * 32; output += num_consumers) {
      const int i = min(output, outputs - 1);
      const int head = i / output_dims;
      const int dim = output < outputs ? first + i % output_dims : config::head_dim;
      float top = -infinity;
#pragma unroll
      for (int w = 0; w < num_consumer_warps; ++w) top = fmaxf(top, scratch.stats[(w * 16 + head) * 2]);
      float total = 0, value = 0;
#pragma unroll
      for (int w = 0; w < num_consumer_warps; ++w) {
        const float m = scratch.stats[(w * 16 + head) * 2];
        const float factor = m == -infinity ? 0.f : ex2(m - top);
        total += factor * scratch.stats[(w * 16 + head) * 2 + 1];
        value += factor * scratch.output[w * outputs + i];
      }
      write(head, dim, value, top, total);
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
    prepare_unit(cta, scratch, exchange, layer, tag, row, kv_head, with_own);
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
    merge_warps(cta, scratch, sums, [&](int group_head, int dim, float value, float top, float total) {
      const int head = kv_head * config::group + group_head;
      if (past.num_chunks == 1) {
        send_halves(cta, out + (head * config::head_dim + dim) * 2, value / total, tag,
                    dim < config::head_dim);
      } else if (dim < config::head_dim) {
        send_partial(partial_at(exchange, row, head, chunk), dim, value, top, total, epoch_of(cta, step, layer));
      }
    });
    if (with_own) append_past(cta, scratch, layer, step, row, kv_head);
  });
  if (chunked) merge_chunks(cta, step, layer, tag);
}
