// top-k, top-p and min-p: which tokens of a row take part in the race. Only rows that ask for it come here; each round
// costs a grid barrier. All CTAs see the same numbers and so come to the same end at the same round.
//
// A head is found digit by digit of the tokens' order: every CTA adds its tokens to buckets in global memory, counted
// and weighed in integers so that the sums do not depend on the order of adding.
#pragma once
#include "adjust.cuh"
#include "grid_barrier.cuh"
#include "order.cuh"

struct Filter {
  float top;    // the row's largest logit; scaled logits are differences to it
  float floor;  // the least scaled logit that may win
  u64 end;      // orders below it are in
};

// In the shared memory of the activations, which nobody needs between the head and the next embedding.
struct SampleScratch {
  u64 weight[num_buckets];
  u32 count[num_buckets];
  Filter filter[max_rows];
  Search search[max_rows];
  Candidate best[max_rows][num_consumer_warps];
};

__device__ __forceinline__ SampleScratch& scratch_of(const Cta& cta) { return *reinterpret_cast<SampleScratch*>(cta.x); }
static_assert(sizeof(SampleScratch) <= config::sample_scratch_bytes, "cuda_header.py counts on it");
static_assert(config::vocab_size <= 1 << id_bits, "an id fits the order");

struct alignas(16) Bucket {
  u64 weight;
  u64 count;
};

// A round adds to one set of buckets, reads it behind the barrier, and clears the set of the next round, which
// everybody has read before the last barrier.
__device__ __forceinline__ Bucket* buckets_of(const Cta& cta, u32 round, int row) {
  return static_cast<Bucket*>(cta.args.buckets) + (round % 3 * exchange_rows + row) * num_buckets;
}

// The largest adjusted logit of every filtered row, over all CTAs; and what to search for first.
__device__ __noinline__ void find_tops(const Cta cta, int step) {
  SampleScratch& scratch = scratch_of(cta);
  const Slice slice(cta, step);
  const Exchange exchange(cta.args);
  for (int row = 0; row < cta.args.num_rows; ++row) {
    if (!has_bit(cta.args.filtered_rows, row)) continue;
    const float* values = values_of(cta, slice, row);
    float top = -infinity;
    for (int id = slice.begin + cta.thread; id < slice.end; id += num_consumers) top = fmaxf(top, values[id]);
    const Candidate best = warp_best({top, 0});
    if (cta.lane == 0) scratch.best[row][cta.warp] = best;
  }
  cta.consumer_sync();
  const int row = cta.warp;
  const bool mine = row < cta.args.num_rows && has_bit(cta.args.filtered_rows, row);
  if (mine) {
    Candidate best = cta.lane < num_consumer_warps ? scratch.best[row][cta.lane] : Candidate{};
    best = warp_best(best);
    if (cta.lane == 0) exchange.top[row * config::num_ctas + cta.idx] = best.value;
  }
  grid_barrier(cta);
  if (mine) {
    float top = -infinity;
    for (int i = cta.lane; i < config::num_ctas; i += 32) {
      top = fmaxf(top, ld_cg_f32(exchange.top + row * config::num_ctas + i));
    }
    top = warp_best({top, 0}).value;
    const bool finite = top > -infinity && top < infinity;
    if (cta.lane == 0) {
      // A row without a finite maximum is not filtered: its race finds that out.
      scratch.filter[row] = {finite ? top : 0.f, finite ? cta.args.floors[row] : -infinity, ~u64(0)};
      const bool by_weight = cta.args.top_k[row] == 0;
      const bool searches = !by_weight || cta.args.top_p[row] != 0;
      scratch.search[row] = {0, static_cast<u64>(cta.args.top_k[row]), first_shift, by_weight, finite && searches};
    }
  }
  cta.consumer_sync();
}

// This CTA's tokens of one row into the buckets of the round.
__device__ __forceinline__ void fill_buckets(const Cta& cta, const Slice& slice, SampleScratch& scratch, int row,
                                             Bucket* buckets) {
  for (int i = cta.thread; i < num_buckets; i += num_consumers) {
    scratch.weight[i] = 0;
    scratch.count[i] = 0;
  }
  cta.consumer_sync();
  const Filter filter = scratch.filter[row];
  const Search search = scratch.search[row];
  const float temperature = cta.args.temperature[row];
  const float* values = values_of(cta, slice, row);
#pragma unroll 1
  for (int id = slice.begin + cta.thread; id < slice.end; id += num_consumers) {
    const float scaled = __fdiv_rn(__fsub_rn(values[id], filter.top), temperature);
    if (!(scaled <= 0.f)) continue;  // a NaN: the row has no next token anyway
    const u64 order = order_of(scaled, id);
    const u64 bucket = (order - search.low) >> search.shift;  // beyond the last one for an order below `low` as well
    if (order >= filter.end || bucket >= num_buckets) continue;
    atomicAdd(&scratch.weight[bucket], weight_of(scaled));
    atomicAdd(&scratch.count[bucket], 1u);
  }
  cta.consumer_sync();
  for (int i = cta.thread; i < num_buckets; i += num_consumers) {
    if (scratch.count[i] == 0) continue;
    atomicAdd(&buckets[i].weight, scratch.weight[i]);
    atomicAdd(&buckets[i].count, u64(scratch.count[i]));
  }
}

__device__ __forceinline__ Bucket load_bucket(const Bucket* bucket) {
  return {ld_relaxed_gpu(&bucket->weight), ld_relaxed_gpu(&bucket->count)};
}

__device__ __forceinline__ u64 sum_up_to_lane(u64 sum, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u64 other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  return sum;
}

// One warp finds the bucket in which the head ends; false if all tokens together do not reach it.
__device__ __forceinline__ bool find_bucket(const Cta& cta, const Bucket* buckets, Search& search, u64 top_p,
                                            Found& found) {
  constexpr int each = num_buckets / 32;
  u64 own = 0;
#pragma unroll 4
  for (int i = 0; i < each; ++i) {
    const Bucket bucket = load_bucket(buckets + cta.lane * each + i);
    own += search.by_weight ? bucket.weight : bucket.count;
  }
  const u64 sum = sum_up_to_lane(own, cta.lane);
  if (search.by_weight && search.shift == first_shift) {
    const u64 total = __shfl_sync(~0u, sum, 31);
    search.wanted = __umul64hi(top_p, total) + 1;
  }
  const u32 reached = __ballot_sync(~0u, sum >= search.wanted);
  const int group = reached == 0 ? 0 : __ffs(reached) - 1;
  const u64 before_group = __shfl_sync(~0u, sum - own, group);
  const Bucket bucket = cta.lane < each ? load_bucket(buckets + group * each + cta.lane) : Bucket{0, 0};
  own = search.by_weight ? bucket.weight : bucket.count;
  const u64 upto = before_group + sum_up_to_lane(own, cta.lane);
  const int lane = (__ffs(__ballot_sync(~0u, upto >= search.wanted)) - 1) & 31;
  found = {group * each + lane, __shfl_sync(~0u, upto - own, lane), __shfl_sync(~0u, own, lane),
           __shfl_sync(~0u, bucket.count, lane)};
  return reached != 0;
}

// What a round tells of one row; one warp. top-p follows on what top-k has kept.
__device__ __forceinline__ void decide(const Cta& cta, SampleScratch& scratch, int row, const Bucket* buckets) {
  Search search = scratch.search[row];
  const u64 top_p = cta.args.top_p[row];
  Found found;
  u64 end = 0;
  if (!find_bucket(cta, buckets, search, top_p, found)) {
    search.active = false;
  } else if (search.shift == first_shift && found.bucket > static_cast<int>(-hopeless * 16)) {
    search.active = false;  // everything that could win is in
  } else {
    end = narrow(search, found);
  }
  const bool next = !search.active && !search.by_weight && top_p != 0;
  __syncwarp();
  if (cta.lane == 0) {
    if (end != 0) scratch.filter[row].end = min(scratch.filter[row].end, end);  // a bucket may reach beyond top-k's
    scratch.search[row] = next ? Search{0, 0, first_shift, true, true} : search;
  }
}

__device__ __forceinline__ u32 searching_rows(const Cta& cta, const SampleScratch& scratch) {
  u32 rows = 0;
  for (int row = 0; row < cta.args.num_rows; ++row) {
    if (has_bit(cta.args.filtered_rows, row) && scratch.search[row].active) rows |= 1u << row;
  }
  return rows;
}

__device__ __noinline__ void find_filters(const Cta cta, int step) {
  SampleScratch& scratch = scratch_of(cta);
  const Slice slice(cta, step);
  while (const u32 rows = searching_rows(cta, scratch)) {
    const u32 round = cta.shared.search_rounds;
    auto* next = reinterpret_cast<Vec16*>(buckets_of(cta, round + 1, 0));
    for (int i = cta.idx * num_consumers + cta.thread; i < exchange_rows * num_buckets;
         i += config::num_ctas * num_consumers) {
      next[i] = Vec16{};
    }
    for (int row = 0; row < cta.args.num_rows; ++row) {
      if (has_bit(rows, row)) fill_buckets(cta, slice, scratch, row, buckets_of(cta, round, row));
    }
    grid_barrier(cta);
    if (cta.thread == 0) cta.shared.search_rounds = round + 1;
    if (has_bit(rows, cta.warp)) decide(cta, scratch, cta.warp, buckets_of(cta, round, cta.warp));
    cta.consumer_sync();
  }
}
