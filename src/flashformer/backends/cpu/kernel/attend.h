// Stage attention: which CTA attends for which rows and heads, and how chunks come together.
#pragma once

#include "stages.h"

// The queries of one row block and kv head, [row][head of the group].
struct Queries {
  const Step& step;
  const Layer& layer;
  const RowBlock& block;
  int kv_head;

  int group() const { return layer.num_q_heads / layer.num_kv_heads; }
  int count() const { return block.num_rows * group(); }
  int row(int i) const { return block.first_row + i / group(); }
  i64 column(int i) const { return i64(kv_head * group() + i % group()) * layer.head_dim; }

  Query query(int i, int chunk) const {
    const int position = step.args.positions[row(i)], start = chunk * chunk_tokens;
    const int first = layer.window > 0 ? std::max(position - layer.window + 1, 0) : 0;
    return {step.space.q + row(i) * q_stride + column(i), std::max(first - start, 0),
            std::min(position + 1 - start, chunk_tokens)};
  }

  // Partials of all queries for one chunk.
  void attend(int chunk, AttentionScratch& scratch, Partial* partials) const {
    const Past past{step.cache(), layer, step.pages(block.first_row), kv_head};
    for (int i = 0; i < count(); i += max_queries) {
      const int queries = std::min(max_queries, count() - i);
      Query some[max_queries];
      bool any = false;
      for (int j = 0; j < queries; ++j) {
        some[j] = query(i + j, chunk);
        any |= some[j].sees_any();
      }
      if (any) attend_chunk(queries, past, chunk, some, scratch, partials + i);
    }
  }

  void write(int i, const Partial& partial) const {
    float* out = step.space.attended + row(i) * q_stride;
    finish(partial, layer.head_dim, out + column(i));
    const int q_rows = layer.num_q_heads * layer.head_dim;
    if (column(i) + layer.head_dim == q_rows)  // zeros up to a whole block of o_proj's columns
      std::fill(out + q_rows, out + (q_rows + 127) / 128 * 128, 0.0f);
  }
};

// All chunks in order, by one CTA.
inline void attend_in_order(Cta& cta, const Queries& queries) {
  CtaSpace& space = queries.step.space.of(cta);
  Partial* partials = space.partials;
  Partial* earlier = partials + block_queries;
  bool begun[block_queries] = {};
  for (int chunk = 0; chunk < queries.block.chunks; ++chunk) {
    queries.attend(chunk, *space.attention, partials);
    for (int i = 0; i < queries.count(); ++i) {
      if (!queries.query(i, chunk).sees_any()) continue;
      if (begun[i]) fold(earlier[i], partials[i], queries.layer.head_dim);
      earlier[i] = partials[i];
      begun[i] = true;
    }
  }
  for (int i = 0; i < queries.count(); ++i) queries.write(i, earlier[i]);
}

// One chunk; the last CTA to finish a chunk of the row block folds them all, in order.
inline void attend_one_chunk(Cta& cta, const Queries& queries, int chunk, Partial* partials, std::atomic<int>& arrivals) {
  CtaSpace& space = queries.step.space.of(cta);
  queries.attend(chunk, *space.attention, partials + i64(chunk) * block_queries);
  // acq_rel: publishes this chunk's partials and, for the last, shows everybody's.
  if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < queries.block.chunks) return;
  arrivals.store(0, std::memory_order_relaxed);
  for (int i = 0; i < queries.count(); ++i) {
    const Partial* folded = nullptr;
    for (int c = 0; c < queries.block.chunks; ++c) {
      if (!queries.query(i, c).sees_any()) continue;
      Partial& next = partials[i64(c) * block_queries + i];
      if (folded != nullptr) fold(*folded, next, queries.layer.head_dim);
      folded = &next;
    }
    queries.write(i, *folded);
  }
}

inline void attention(Cta& cta, Step& step, const Layer& layer) {
  const Workspace& space = step.space;
  const int heads = layer.num_kv_heads, pairs = space.num_blocks * heads;
  const i64 partials = i64(space.num_chunks) * heads * block_queries;
  if (pairs >= enough_units || space.num_chunks == space.num_blocks || partials > max_partials) {
    cta.share_evenly(pairs, 1, [&](int pair, int) {
      attend_in_order(cta, {step, layer, space.blocks[pair / heads], pair % heads});
    });
    return;
  }
  cta.share_evenly(space.num_chunks * heads, 1, [&](int unit, int) {
    const int head = unit % heads;
    int block = 0;
    while (unit / heads >= space.blocks[block].first_unit + space.blocks[block].chunks) ++block;
    const RowBlock& rows = space.blocks[block];
    Partial* of_pair = space.partials + (i64(rows.first_unit) * heads + i64(head) * rows.chunks) * block_queries;
    attend_one_chunk(cta, {step, layer, rows, head}, unit / heads - rows.first_unit, of_pair,
                     space.arrivals[block * heads + head]);
  });
}
