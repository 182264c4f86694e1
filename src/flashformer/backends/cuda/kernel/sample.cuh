// The next token of every row, chosen by every CTA for itself from the candidates of all: engine/sampler.py in a kernel.
//
// Greedy rows bring the best of the finishing warp and cost nothing more. Other rows race: each token's scaled logit plus
// noise of its own (Gumbel-max), in any order on any CTA; one exchange of candidates at the token's end decides all.
#pragma once
#include "filter.cuh"
#include "philox.cuh"

// This thread's best token of one row: four ids share a block of random words.
__device__ __forceinline__ Candidate race(const Cta& cta, const Slice& slice, int row, const Filter& filter) {
  const float* values = values_of(cta, slice, row);
  const float temperature = cta.args.temperature[row];
  const u32 position = static_cast<u32>(cta.args.positions[row] + slice.step + 1);
  Candidate best;
#pragma unroll 1
  for (int first = slice.begin + cta.thread * 4; first < slice.end; first += num_consumers * 4) {
    Vec16 words{};
    if (temperature > 0.f) {
      words = philox4x32({static_cast<u32>(first / 4), position, static_cast<u32>(cta.args.indices[row]), 0},
                         cta.args.seeds[row]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int id = first + i;
      if (id >= slice.end) break;
      float score = values[id];
      if (temperature > 0.f) {
        const float scaled = __fdiv_rn(__fsub_rn(score, filter.top), temperature);
        if (!(scaled >= filter.floor)) continue;
        if (filter.end != ~u64(0) && order_of(scaled, id) >= filter.end) continue;
        score = scaled + gumbel(words.w[i]);
      }
      take_better(best, {score, id});
    }
  }
  return best;
}

// Replaces the choice of every row that is not plainly greedy. Not inlined, as all that such rows need: the model's code
// has no registers to spare.
__device__ __noinline__ void race_rows(const Cta cta, int step) {
  SampleScratch& scratch = scratch_of(cta);
  const Slice slice(cta, step);
  for (int row = 0; row < cta.args.num_rows; ++row) {
    if (!has_bit(cta.args.sampled_rows, row)) continue;
    const bool filtered = has_bit(cta.args.filtered_rows, row);
    const Filter filter = filtered ? scratch.filter[row] : Filter{0.f, -infinity, ~u64(0)};
    const Candidate best = warp_best(race(cta, slice, row, filter));
    if (cta.lane == 0) scratch.best[row][cta.warp] = best;
  }
  cta.consumer_sync();
  const int row = cta.warp;
  if (row >= cta.args.num_rows || !has_bit(cta.args.sampled_rows, row)) return;
  const Candidate best = warp_best(cta.lane < num_consumer_warps ? scratch.best[row][cta.lane] : Candidate{});
  if (cta.lane == 0 && cta.shared.choice_id[row] != not_a_number) {
    cta.shared.choice_value[row] = best.value;
    cta.shared.choice_id[row] = best.id;
  }
}

// Before the barrier: this CTA's candidates, from CTA 0 whether the host wants the launch to end, and the step's keys and
// values for those who will read them by bulk copies.
__device__ __forceinline__ void publish(const Cta& cta, const Exchange& exchange, int step) {
  fence_proxy_async();
  if (cta.lane == 0 && cta.warp < cta.args.num_rows) {
    const int at = cta.warp * config::num_ctas + cta.idx;
    const bool lost = cta.aborted();
    exchange.best_logit[at] = lost ? infinity : cta.shared.choice_value[cta.warp];
    exchange.best_id[at] = lost ? abandoned : cta.shared.choice_id[cta.warp];
  }
  if (cta.thread == 0) {
    cta.shared.last = step + 1 == cta.args.num_steps;
    if (cta.idx == 0) *exchange.stop = cta.shared.stop;
  }
}

// Behind the barrier: warp w picks for row w.
__device__ __forceinline__ void pick(const Cta& cta, const Exchange& exchange, int step) {
  const int row = cta.warp;
  if (row < cta.args.num_rows) {
    Candidate best;
    for (int i = cta.lane; i < config::num_ctas; i += 32) {
      const int at = row * config::num_ctas + i;
      take_better(best, {ld_cg_f32(exchange.best_logit + at),
                         __float_as_int(ld_cg_f32(reinterpret_cast<const float*>(exchange.best_id + at)))});
    }
    best = warp_best(best);
    const bool finite = best.value > -infinity && best.value < infinity;
    // What was left off after the candidates had been sent does not count: all CTAs must choose the same.
    const int id = cta.timed_out() ? abandoned : best.id < 0 || finite ? best.id : not_finite;
    bool ends = id < 0;
    for (int i = cta.lane; i < cta.args.num_stop_ids[row]; i += 32) {
      ends |= cta.args.stop_ids[row * max_stop_ids + i] == id;
    }
    if (ends) cta.shared.last = 1;
    if (cta.lane == 0) {
      cta.shared.token[row] = id;
      count_token(cta, row, id);
      if (cta.idx == 0) st_relaxed_sys(reinterpret_cast<u32*>(cta.args.out_tokens) + step * exchange_rows + row, id);
    }
  }
  if (cta.thread == 0 && ld_relaxed_gpu(exchange.stop) != 0) cta.shared.last = 1;
  cta.consumer_sync();
}

// Chooses, counts and sends out the next token of every row. Returns whether the launch ends with it, at the same token
// for all CTAs: the host wants it, a row has its last token, or that was the number of steps.
__device__ __noinline__ bool choose_tokens(const Cta cta, int step) {
  const Exchange exchange(cta.args);
  if (cta.args.sampled_rows != 0) {
    if (cta.args.adjusted_rows != 0) adjust_rows(cta, step);
    if (cta.args.filtered_rows != 0) {
      find_tops(cta, step);
      find_filters(cta, step);
    }
    race_rows(cta, step);
  }
  cta.consumer_sync();
  publish(cta, exchange, step);
  grid_barrier(cta);
  cta.trace(Moment::meet);
  pick(cta, exchange, step);
  return cta.shared.last != 0;
}
