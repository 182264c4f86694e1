// A unit's query heads, and the step's own keys and values: from packets to operands of attention.
//
// A warp takes a head, a lane four neighbouring dims, which stay in its registers through RMSNorm (if the model has it) and
// rotary embedding.
#pragma once
#include "chunks.cuh"

constexpr int output_dims = config::group <= 4 ? (head_dim_padded < 128 ? head_dim_padded : 128) : 64;
constexpr int output_stride = output_dims + 8;  // floats; eight heads then lie on different banks

// In the shared memory of the activations, which nobody needs during attention. geometry.py knows its size.
struct AttentionScratch {
  u8* query;     // [dim_blocks][512]: operand A
  u8* keys;      // [dim_blocks][512]: the step's own keys (of the row's sequence), 16 positions from base on
  u8* values;    // likewise
  float* stats;  // [num_consumer_warps][16][2]: maximum, sum
  float* output; // [num_consumer_warps][group][output_stride]

  __device__ explicit AttentionScratch(u8* p)
      : query(p), keys(p + dim_blocks * 512), values(p + 2 * dim_blocks * 512),
        stats(reinterpret_cast<float*>(p + 3 * dim_blocks * 512)), output(stats + num_consumer_warps * 32) {}
};

// merge_chunks, which comes after the units, takes the same memory.
static_assert(merge_floats <= num_consumer_warps * (32 + config::group * output_stride));

constexpr int rotary_half = config::rotary_dim / 2;
static_assert(rotary_half % 2 == 0, "dims of both halves have their partners at the same place of a packet");
constexpr int head_packets = config::head_dim / 4;
constexpr int packets_a_lane = (head_dim_padded / 4 + 31) / 32;  // of a head and its padding

// What the heads of a unit are made of, and where its row's own key and value go. Worked out by the caller, where the
// launch's arguments are constants and not loads.
struct UnitHeads {
  const float* qkv;     // of row 0, in the exchange
  const float* q_norm;  // [head_dim], if the model has it
  const float* k_norm;
  u8* page;             // of keys; values follow
  int token;            // in it
  int row;
  int kv_head;
  int num_own;          // the step's own positions that the unit sees

  __device__ __forceinline__ UnitHeads(const Cta& cta, const Exchange& exchange, int layer, int step, int row_,
                                       int kv_head_, bool with_own)
      : qkv(exchange.qkv), q_norm(vector_at(cta, layer_table[layer].q_norm)),
        k_norm(vector_at(cta, layer_table[layer].k_norm)),
        page(const_cast<u8*>(page_at(cta, layer, cta.shared.own_page[row_], kv_head_))),
        token((cta.args.positions[row_] + step) % config::page_tokens), row(row_), kv_head(kv_head_),
        num_own(with_own ? cta.args.positions[row_] - cta.args.bases[row_] + 1 : 0) {}
};

// One head of q, k or v of one row.
struct HeadTask {
  const float* source;  // in the exchange
  const float* norm;
  int part;             // 0 query, 1 key, 2 value
  int index;            // head of the group / position after base
  int row;

  // The i-th of a unit's heads: the query heads of the group, then key and value of each of the step's own positions.
  __device__ __forceinline__ HeadTask(const UnitHeads& unit, int i) {
    int first;  // row of the qkv projection
    if (i < config::group) {
      part = 0;
      index = i;
      row = unit.row;
      first = (unit.kv_head * config::group + i) * config::head_dim;
    } else {
      part = 1 + (i - config::group) % 2;
      index = (i - config::group) / 2;
      row = unit.row - unit.num_own + 1 + index;  // a sequence's positions are consecutive rows, the unit's the last
      first = config::q_rows + ((part - 1) * config::num_kv_heads + unit.kv_head) * config::head_dim;
    }
    source = unit.qkv + u64(row) * padded(config::qkv_rows) + first;
    norm = part == 0 ? unit.q_norm : unit.k_norm;
  }
};

struct Head {
  Vec16 packet[packets_a_lane];  // the lane's are lane, lane + 32, ...; zeros in the padding

  static __device__ __forceinline__ int packet_idx(const Cta& cta, int j) { return cta.lane + 32 * j; }

  __device__ __forceinline__ void fetch(const Cta& cta, const HeadTask& task, u32 tag) {
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = packet_idx(cta, j);
      packet[j] = Vec16{};
      if (at >= head_packets) continue;
      packet[j] = ld_relaxed_gpu_b128(task.source + 4 * at);
      if (config::qk_norm && task.part < 2) prefetch(task.norm + 4 * at);  // registers are short
    }
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = packet_idx(cta, j);
      if (at < head_packets) await_packet<Payload::single>(cta, packet[j], task.source + 4 * at, tag);
    }
  }

  // RMSNorm over the head.
  __device__ __forceinline__ void normalise(const Cta& cta, const HeadTask& task) {
    float square = 0;
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
#pragma unroll
      for (u32 word : packet[j].w) square += __uint_as_float(word) * __uint_as_float(word);
    }
    const float rstd = rsqrtf(warp_sum(square) / config::head_dim + config::rms_norm_eps);
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = packet_idx(cta, j);
      if (at >= head_packets) continue;
      const float4 norm = reinterpret_cast<const float4*>(task.norm)[at];
      const float weight[4] = {norm.x, norm.y, norm.z, norm.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        packet[j].w[e] = __float_as_uint(__uint_as_float(packet[j].w[e]) * (rstd * weight[e]));
      }
    }
  }

  // Element e of the head's packet `at`, for every lane one of its own; all lanes call.
  __device__ __forceinline__ float element(int at, int e) const {
    u32 found = 0;
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const u32 word = __shfl_sync(~0u, packet[j].w[e], at % 32);
      if (packets_a_lane == 1 || at / 32 == j) found = word;
    }
    return __uint_as_float(found);
  }

  // Rotary embedding. rotation: [rotary_half] cos and sin of the row's position.
  __device__ __forceinline__ void rotate(const Cta& cta, const float2* rotation) {
    Head turned = *this;
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int dim = packet_idx(cta, j) * 4 + e;
        const bool first = dim < rotary_half;
        const bool turns = dim < 2 * rotary_half;
        const int partner = !turns ? 0 : first ? dim + rotary_half : dim - rotary_half;
        const float other = element(partner / 4, (e + rotary_half) % 4);
        const float2 turn = rotation[turns ? min(dim, partner) : 0];
        const float value = __uint_as_float(packet[j].w[e]) * turn.x + (first ? -other : other) * turn.y;
        if (turns) turned.packet[j].w[e] = __float_as_uint(value);
      }
    }
    *this = turned;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
#pragma unroll
      for (u32& word : packet[j].w) word = __float_as_uint(__uint_as_float(word) * factor);
    }
  }

  // Packet j as bf16: the first two dims, the other two.
  __device__ __forceinline__ uint2 halves_of(int j) const {
    const u32(&w)[4] = packet[j].w;
    return {cvt_bf16x2(__uint_as_float(w[0]), __uint_as_float(w[1])),
            cvt_bf16x2(__uint_as_float(w[2]), __uint_as_float(w[3]))};
  }

  // Into operand A, as row `index`.
  __device__ __forceinline__ void store_query(const Cta& cta, u8* query, int index) const {
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int at = packet_idx(cta, j);
      if (at >= head_dim_padded / 4) continue;
      u32* to = reinterpret_cast<u32*>(query + at / 4 * 512 + (index % 8 * 4 + at % 4) * 16) + index / 8;
      const uint2 two = halves_of(j);
      to[0] = two.x;
      to[2] = two.y;
    }
  }
  // Into a page of keys or of values, or the block of a step's own.
  __device__ __forceinline__ void store_past(const Cta& cta, u8* page, int token, bool is_key) const {
#pragma unroll
    for (int j = 0; j < packets_a_lane; ++j) {
      const int dim = packet_idx(cta, j) * 4;
      if (dim >= head_dim_padded) continue;
      const uint2 two = halves_of(j);
      if (is_key) {
        *reinterpret_cast<uint2*>(page + key_offset(token, dim)) = two;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const u32 pair = e < 2 ? two.x : two.y;
          *reinterpret_cast<u16*>(page + value_offset(token, dim + e)) = static_cast<u16>(pair >> 16 * (e % 2));
        }
      }
    }
  }
};

// A complete head to where attention wants it. The row's own key and value also go into its page, for the steps to come
// (`publish` makes them visible).
__device__ __forceinline__ void place_head(const Cta& cta, const AttentionScratch& scratch, const UnitHeads& unit,
                                           const HeadTask& task, Head& head, int rope_idx) {
  if (task.part < 2) {
    if constexpr (config::qk_norm) head.normalise(cta, task);
    if (rotary_half > 0 && rope_idx >= 0) head.rotate(cta, cta.shared.rotation[rope_idx][task.row]);
  }
  if (task.part == 0) {
    head.scale(config::attention_scale * 1.4426950408889634f);  // exp(x) = 2^(x log2 e)
    head.store_query(cta, scratch.query, task.index);
    return;
  }
  const bool is_key = task.part == 1;
  head.store_past(cta, is_key ? scratch.keys : scratch.values, task.index, is_key);
  if (task.row == unit.row) head.store_past(cta, unit.page + (is_key ? 0 : page_bytes), unit.token, is_key);
}

// Query heads of the unit into operand A, and the step's own keys and values into one block of 16 positions. What the
// block holds beyond them is not visible.
__device__ __noinline__ void prepare_unit(const Cta cta, const UnitHeads unit, int rope_idx, u32 tag) {
  const AttentionScratch scratch(cta.x);
  const int num_tasks = config::group + 2 * unit.num_own;
#pragma unroll 1
  for (int i = cta.warp; i < max(num_tasks, num_consumer_warps); i += num_consumer_warps) {
    Head head;
    if (i < num_tasks) head.fetch(cta, HeadTask(unit, i), tag);
    if (i == cta.warp) cta.consumer_sync();  // every warp has left what the scratch held
    if (i >= num_tasks) continue;
    asm volatile("" : "+r"(i));  // the task is derived again, not kept in registers across the barrier
    place_head(cta, scratch, unit, HeadTask(unit, i), head, rope_idx);
  }
  cta.consumer_sync();
}
