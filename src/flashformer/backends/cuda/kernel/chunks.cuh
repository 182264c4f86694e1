// The chunks of a row's attention, added up: each unit leaves one partial result a query head, and the CTAs share the heads.
//
// Flash-decoding (Dao et al. 2023) with dated values instead of a second launch: whoever merges a head waits for its chunks.
#pragma once
#include "past.cuh"

constexpr int merge_vecs = config::head_dim / 2;  // a thread takes two neighbouring dims
constexpr int merge_threads = merge_vecs <= 8 ? 8 : merge_vecs <= 16 ? 16 : merge_vecs <= 32 ? 32 : merge_vecs <= 64 ? 64 : 128;
constexpr int merge_side = num_consumers / merge_threads;  // chunks side by side
// Chunks of a thread in one round: as many as its registers hold, and a warp's lanes know the maximums of.
constexpr int merge_deep = least(config::arch >= 90 ? 8 : 2, 32 / merge_side);
constexpr int merge_round = merge_side * merge_deep;
constexpr int merge_floats = merge_side * merge_threads * 2;

// Of the partial results of a layer.
__device__ __forceinline__ u32 epoch_of(const Cta& cta, int step, int layer) {
  return cta.args.epoch + step * config::num_layers + layer;
}

__device__ __forceinline__ u8* partial_at(const Exchange& exchange, int row, int head, int chunk) {
  return exchange.partial + u64((row * num_q_heads + head) * config::max_chunks + chunk) * partial_bytes;
}

// Two dims of a unit's sums over its chunk, not yet divided by the sum of weights; dim 0 brings that and the maximum along.
__device__ __forceinline__ void send_partial(u8* partial, int dim, float2 sums, float maximum, float sum, u32 epoch) {
  send_dated(partial + (2 + dim) * dated_bytes, sums, epoch);
  if (dim == 0) send_dated(partial, make_float2(maximum, sum), epoch);
}

// Some chunks of a head on their way: this thread's two dims of several, and the lane's maximum and sum of one.
struct MergeRound {
  Vec16 value[merge_deep];
  Vec16 stats;

  // Chunks first.. of `num`; polls until all are there.
  __device__ __forceinline__ void fetch(const Cta& cta, const u8* head, int first, int num, u32 epoch) {
    const Stopwatch stopwatch(cta, WaitKind::packet);
    Patience patience;
    const int vec = cta.thread % merge_threads;
    const int side = cta.thread / merge_threads;
    const bool has_stats = cta.lane < merge_round && first + cta.lane < num;
    stats = Vec16{};
#pragma unroll
    for (int j = 0; j < merge_deep; ++j) value[j] = Vec16{};
    bool complete;
    do {
      complete = true;
      if (has_stats && !both_arrived(stats, epoch)) {
        stats = ld_relaxed_gpu_b128(head + u64(first + cta.lane) * partial_bytes);
        complete = false;
      }
#pragma unroll
      for (int j = 0; j < merge_deep; ++j) {
        const int chunk = first + side + j * merge_side;
        if (chunk < num && vec < merge_vecs && !both_arrived(value[j], epoch)) {
          value[j] = ld_relaxed_gpu_b128(head + u64(chunk) * partial_bytes + (2 + 2 * vec) * dated_bytes);
          complete = false;
        }
      }
    } while (!complete && !patience.ends(cta.args, cta.shared, WaitKind::packet));
    if (!has_stats) stats.w[0] = __float_as_uint(-infinity);
  }
};

// One query head of a row: its chunks in order, then the packets that o_proj waits for. scratch: [merge_floats].
__device__ __forceinline__ void merge_head(const Cta& cta, float* scratch, const u8* partials, int num_chunks, u8* out,
                                           u32 epoch, u32 tag) {
  float top = -infinity, total = 0;
  float2 sum{};
#pragma unroll 1
  for (int first = 0; first < num_chunks; first += merge_round) {
    MergeRound round;
    round.fetch(cta, partials, first, num_chunks, epoch);
    const float maximum = __uint_as_float(round.stats.w[0]);
    float higher = fmaxf(top, maximum);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, d));
    const float shift = higher == -infinity ? 0.f : higher;  // nothing visible yet: all weights are 2^-inf = 0
    const float factor = ex2(maximum - shift);
    const float scale = ex2(top - shift);
    total = total * scale + warp_sum(factor * __uint_as_float(round.stats.w[2]));
    top = higher;
    sum.x *= scale;
    sum.y *= scale;
#pragma unroll
    for (int j = 0; j < merge_deep; ++j) {
      const float f = __shfl_sync(~0u, factor, cta.thread / merge_threads + j * merge_side);
      sum.x = fmaf(f, __uint_as_float(round.value[j].w[0]), sum.x);
      sum.y = fmaf(f, __uint_as_float(round.value[j].w[2]), sum.y);
    }
  }
  cta.consumer_sync();  // every warp has left what the scratch held
  reinterpret_cast<float2*>(scratch)[cta.thread] = sum;
  cta.consumer_sync();
  for (int dim = cta.thread; dim < (config::head_dim + 31) / 32 * 32; dim += num_consumers) {
    float value = 0;
#pragma unroll
    for (int side = 0; side < merge_side; ++side) value += scratch[side * merge_threads * 2 + min(dim, merge_threads * 2 - 1)];
    send_halves(cta, out + dim * 2, __fdividef(value, total), tag, dim < config::head_dim);
  }
}

// The heads that this CTA merges: from the last CTA on, since units start at the first.
__device__ __noinline__ void merge_chunks(const Cta cta, int step, int layer, u32 tag) {
  const int window = layer_table[layer].window;
  const u32 epoch = epoch_of(cta, step, layer);
  float* scratch = reinterpret_cast<float*>(cta.x);
  const Exchange exchange(cta.args);
  int first_head = 0;  // of the row, among the merged heads of all rows
  for (int row = 0; row < cta.args.num_rows; ++row) {
    const RowPast past(cta.args.positions[row] + step, cta.args.bases[row] + step, window);
    if (past.num_chunks == 1) continue;
    int head = config::num_ctas - 1 - cta.idx - first_head % config::num_ctas;
    if (head < 0) head += config::num_ctas;
    for (; head < num_q_heads; head += config::num_ctas) {
      merge_head(cta, scratch, partial_at(exchange, row, head, 0), past.num_chunks,
                 exchange.attention + row * x_row_bytes(config::q_rows) + head * config::head_dim * 2, epoch, tag);
    }
    first_head += num_q_heads;
  }
}
