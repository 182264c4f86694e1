// Stage embed: token ids -> residual stream; also the rotations and row blocks that all layers share.
#pragma once

#include "rope.h"
#include "stages.h"

inline void embed_token(const Step& step, int row, int first_col, int end_col) {
  const Matrix& matrix = config::embed_tokens;
  const int id = step.args.token_ids[row];
  const u8* tile = step.args.image + matrix.offset + id / tile_rows * matrix.tile_bytes;
  float* out = step.space.hidden + row * hidden_stride;
  with_format<config::head_format>(matrix, [&](auto format) {
    for (int col = first_col; col < end_col; ++col)
      out[col] = weight_at<format()>(tile, matrix.tile_bytes, matrix.cols, id % tile_rows, col);
    if constexpr (format() == Format::bf16c)
      for_exceptions(tile, [&](int r, int col, float weight) {
        if (r == id % tile_rows && first_col <= col && col < end_col) out[col] = weight;
      });
  });
}

// Rows of one sequence that follow each other, up to block_rows of them.
inline void make_row_blocks(Step& step) {
  Workspace& space = step.space;
  const StepArgs& args = step.args;
  space.num_blocks = space.num_chunks = 0;
  for (int row = 0; row < args.num_rows;) {
    int end = row + 1;
    while (end < args.num_rows && end - row < block_rows && args.slots[end] == args.slots[row]) ++end;
    const int chunks = args.positions[end - 1] / chunk_tokens + 1;
    space.blocks[space.num_blocks++] = {row, end - row, space.num_chunks, chunks};
    space.num_chunks += chunks;
    row = end;
  }
}

inline void embed(Cta& cta, Step& step) {
  constexpr int parts = 4;  // of a row: one token is embedded by several CTAs
  constexpr int units = parts + config::num_ropes;
  if (cta.idx == 0) make_row_blocks(step);
  cta.share_evenly(step.rows() * units, 1, [&](int unit, int) {
    const int row = unit / units, part = unit % units;
    if (part < parts)
      return embed_token(step, row, config::hidden_size * part / parts, config::hidden_size * (part + 1) / parts);
    const config::Rope& rope = config::ropes[part - parts];
    float* cosines = step.rotation(part - parts, row);
    fill_rotation(step.vector(rope.inv_freq), rope.rotary_dim / 2, step.args.positions[row], rope.attention_factor,
                  cosines, cosines + rotation_stride / 2);
  });
}
