// Bias, masks and penalties: logits -> adjusted logits, each CTA for the tokens whose logits it has computed. The
// operations and their order are those of engine/sampler.py, so the results have the same bits.
#pragma once
#include "candidate.cuh"

constexpr int max_stop_ids = config::max_stop_ids;
constexpr u32 in_prompt = 1u << 31;  // of a count; the rest is how often the token was drawn

// The ids whose logits this CTA has computed, and where they lie.
struct Slice {
  int begin;
  int end;
  int step;

  __device__ __forceinline__ Slice(const Cta& cta, int step_) : step(step_) {
    using Head = Stage<Kind::lm_head>;
    begin = Head::begin(cta.idx) * tile_rows;
    end = min(Head::end(cta.idx) * tile_rows, config::vocab_size);
  }
  __device__ __forceinline__ bool has(int id) const { return id >= begin && id < end; }
};

__device__ __forceinline__ const float* values_of(const Cta& cta, const Slice& slice, int row) {
  if (has_bit(cta.args.adjusted_rows, row)) return cta.args.adjusted + row * u64(logits_stride);
  return logits_of(cta, row);
}

__device__ __forceinline__ u32* counts_of(const Cta& cta, int row) {
  return cta.args.counts + row * u64(logits_stride);
}

__device__ __forceinline__ float penalised(const StepArgs& args, int row, float value, u32 count) {
  if (count == 0) return value;
  const float repetition = args.repetition_penalty[row];
  const float drawn = static_cast<float>(count & ~in_prompt);
  value = value > 0.f ? __fdiv_rn(value, repetition) : __fmul_rn(value, repetition);
  value = __fsub_rn(value, __fmul_rn(args.frequency_penalty[row], drawn));
  return __fsub_rn(value, drawn > 0.f ? args.presence_penalty[row] : 0.f);
}

__device__ __forceinline__ void adjust(const Cta& cta, const Slice& slice, int row) {
  const StepArgs& args = cta.args;
  const float* logits = logits_of(cta, row);
  const float* bias = has_bit(args.biased_rows, row) ? args.bias + row * u64(logits_stride) : nullptr;
  const u32* counts = has_bit(args.penalised_rows, row) ? counts_of(cta, row) : nullptr;
  float* adjusted = args.adjusted + row * u64(logits_stride);
  for (int id = slice.begin + cta.thread; id < slice.end; id += num_consumers) {
    float value = logits[id];
    if (bias) value = __fadd_rn(value, bias[id]);
    if (counts) value = penalised(args, row, value, counts[id]);
    adjusted[id] = value;
  }
  if (slice.step >= args.min_steps[row]) return;
  cta.consumer_sync();
  for (int i = cta.thread; i < args.num_stop_ids[row]; i += num_consumers) {
    const int id = args.stop_ids[row * max_stop_ids + i];
    if (slice.has(id)) adjusted[id] = -infinity;
  }
}

__device__ __noinline__ void adjust_rows(const Cta cta, int step) {
  const Slice slice(cta, step);
  for (int row = 0; row < cta.args.num_rows; ++row) {
    if (has_bit(cta.args.adjusted_rows, row)) adjust(cta, slice, row);
  }
  cta.consumer_sync();
}

// The drawn token counts from now on.
__device__ __forceinline__ void count_token(const Cta& cta, int row, int id) {
  if (has_bit(cta.args.penalised_rows, row) && Slice(cta, 0).has(id)) counts_of(cta, row)[id] += 1;
}
