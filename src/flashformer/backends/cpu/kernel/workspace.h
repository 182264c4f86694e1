// The buffers of a step, shared and of each CTA, in one zeroed piece of memory.
#pragma once

#include <atomic>
#include <cstdlib>

#include "attention.h"
#include "matmul.h"
#include "threads.h"

inline constexpr int max_columns = std::max({config::hidden_size, config::max_q_rows, config::max_intermediate_size});
inline constexpr i64 hidden_stride = row_stride(config::hidden_size);
inline constexpr i64 q_stride = row_stride(config::max_q_rows);
inline constexpr i64 activated_stride = row_stride(config::max_intermediate_size);
inline constexpr i64 input_stride = row_stride(max_columns);
inline constexpr i64 input_groups = group_stride(max_columns);
inline constexpr i64 rotation_stride = std::max(config::max_rotary_dim, 1);
// Steps with fewer rows: every CTA prepares the inputs itself rather than wait for the others.
inline constexpr int shared_rows = 4;

// Consecutive rows of one sequence that attend together.
struct RowBlock {
  int first_row;
  int num_rows;
  int first_unit;  // chunks of the blocks before
  int chunks;
};

inline constexpr int block_rows = std::max(1, max_queries / config::min_group);
inline constexpr int block_queries = std::max(max_queries, block_rows * config::max_group);
inline constexpr int context_chunks = (config::context + chunk_tokens - 1) / chunk_tokens;
// With this many (row block, kv head) pairs a step has work for all CTAs without cutting at chunks.
inline constexpr int enough_units = 4 * config::num_ctas;
inline constexpr i64 max_partials =
    std::min<i64>(i64(enough_units) * context_chunks * block_queries, (i64(64) << 20) / i64(sizeof(Partial)));

struct CtaSpace {
  ActivationBuffer input;  // [shared_rows]
  float* sums;  // [sums_tiles][max_rows][16]
  u8* unpacked;
  float* head;  // [head_stride]
  AttentionScratch* attention;
  Partial* partials;  // [2][block_queries]
  float* best_logit;  // [max_rows]
  int* best_id;
};

struct Workspace {
  float* hidden;  // [max_rows][hidden_stride]: the residual stream
  float* q;  // [max_rows][q_stride], after QK-norm and RoPE, times the attention scale
  float* attended;  // [max_rows][q_stride]
  float* activated;  // [max_rows][activated_stride]
  float* rotations;  // [num_ropes][max_rows][cosines, sines][rotation_stride / 2]
  ActivationBuffer input;  // [max_rows]
  RowBlock* blocks;  // [max_rows]
  int num_blocks;
  int num_chunks;  // of all blocks
  Partial* partials;  // [units][block_queries]
  std::atomic<int>* arrivals;  // [enough_units]
  CtaSpace* ctas;  // [num_ctas]

  CtaSpace& of(const Cta& cta) { return ctas[cta.idx]; }
};

// Hands out pieces of a memory area; without one it only counts.
class Arena {
 public:
  explicit Arena(u8* base) : base_(base) {}

  template <class T>
  T* take(i64 count) {
    const i64 start = used_;
    used_ += (count * i64(sizeof(T)) + 63) / 64 * 64 + 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + start);
  }
  i64 used() const { return used_; }

 private:
  u8* base_;
  i64 used_ = 0;
};

inline ActivationBuffer take_input(Arena& arena, int rows) {
  return {arena.take<float>(rows * input_stride), arena.take<i16>(rows * input_stride),
          arena.take<float>(rows * input_groups), arena.take<i32>(rows * input_groups)};
}

inline CtaSpace take_cta_space(Arena& arena, int sums_tiles) {
  CtaSpace space{};
  space.input = take_input(arena, shared_rows);
  space.sums = arena.take<float>(i64(sums_tiles) * config::max_rows * tile_rows);
  space.unpacked = arena.take<u8>(unpacked_bytes);
  space.head = arena.take<float>(head_stride);
  space.attention = arena.take<AttentionScratch>(1);
  space.partials = arena.take<Partial>(2 * block_queries);
  space.best_logit = arena.take<float>(config::max_rows);
  space.best_id = arena.take<int>(config::max_rows);
  return space;
}

inline Workspace take_workspace(Arena& arena, int sums_tiles) {
  Workspace space{};
  space.hidden = arena.take<float>(config::max_rows * hidden_stride);
  space.q = arena.take<float>(config::max_rows * q_stride);
  space.attended = arena.take<float>(config::max_rows * q_stride);
  space.activated = arena.take<float>(config::max_rows * activated_stride);
  space.rotations = arena.take<float>(i64(config::num_ropes) * config::max_rows * rotation_stride);
  space.input = take_input(arena, config::max_rows);
  space.blocks = arena.take<RowBlock>(config::max_rows);
  space.partials = arena.take<Partial>(max_partials);
  space.arrivals = arena.take<std::atomic<int>>(enough_units);
  space.ctas = arena.take<CtaSpace>(config::num_ctas);
  for (int i = 0; i < config::num_ctas; ++i) {
    const CtaSpace cta = take_cta_space(arena, sums_tiles);
    if (space.ctas != nullptr) space.ctas[i] = cta;
  }
  return space;
}
