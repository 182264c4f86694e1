// What every stage is made of: the step at hand, its inputs, and the walk over a matrix's tiles.
#pragma once

#include "workspace.h"

using config::Matrix;

struct Step {
  const StepArgs& args;
  Workspace& space;

  int rows() const { return args.num_rows; }
  const float* vector(i64 offset) const { return (const float*)(args.image + offset); }
  KvCache cache() const { return {args.kv_pages, args.num_pages}; }
  const int* pages(int row) const { return args.page_table + i64(args.slots[row]) * args.max_pages; }
  float* rotation(int rope, int row) const {
    return space.rotations + (i64(rope) * config::max_rows + row) * rotation_stride;
  }
};

// First tile of a CTA's share.
inline int first_tile(const Matrix& matrix, int cta) { return config::first_tiles[matrix.split][cta]; }

// The weights that a CTA reads first in the next phase.
inline Ahead ahead_of(const Step& step, const Matrix& matrix, const Cta& cta) {
  constexpr i64 most = 64 << 10;
  const u8* start = step.args.image + matrix.offset + first_tile(matrix, cta.idx) * matrix.tile_bytes;
  const i64 share = (first_tile(matrix, cta.idx + 1) - first_tile(matrix, cta.idx)) * matrix.tile_bytes;
  return {start, start + std::min(most, share)};
}

// Calls use(integral_constant<format>) with the format of a matrix: `format`, or bf16 where bf16c does not pay.
template <Format format, class Use>
void with_format(const Matrix& matrix, Use&& use) {
  if constexpr (format == Format::bf16c && config::some_plain)
    if (matrix.format != format) return use(std::integral_constant<Format, Format::bf16>{});
  use(std::integral_constant<Format, format>{});
}

// Builds the activations of `rows` rows; values(row, out) writes (or finds) a row's floats.
template <Format format, class Values>
Activations prepare(Cta& cta, Step& step, int rows, int cols, Values&& values) {
  const bool alone = rows < shared_rows;
  const ActivationBuffer& to = alone ? step.space.of(cta).input : step.space.input;
  for (int row = alone ? 0 : cta.idx; row < rows; row += alone ? 1 : cta.team.size()) {
    const float* x = values(row, to.values + row * input_stride);
    if constexpr (!is_float(format))
      quantise_row<format>(x, cols, to.codes + row * input_stride, to.scales + row * input_groups,
                           to.offsets + row * input_groups);
  }
  if (!alone) cta.sync();
  return {rows, input_stride, to.values, to.codes, to.scales, to.offsets, input_groups};
}

// RMSNorm of rows of the residual stream; row_of(i) names them.
template <Format format, class RowOf>
Activations normalise(Cta& cta, Step& step, int rows, i64 weight, RowOf&& row_of) {
  return prepare<format>(cta, step, rows, config::hidden_size, [&](int i, float* out) {
    const float* x = step.space.hidden + row_of(i) * hidden_stride;
    rms_norm(x, step.vector(weight), config::hidden_size, config::rms_norm_eps, out);
    return out;
  });
}

// Rows of a buffer as they are.
template <Format format>
Activations take_rows(Cta& cta, Step& step, const float* buffer, i64 stride, int cols) {
  if constexpr (is_float(format)) return {step.rows(), stride, buffer, nullptr, nullptr, nullptr, 0};
  return prepare<format>(cta, step, step.rows(), cols, [&](int row, float*) { return buffer + row * stride; });
}

// Multiplies this CTA's tiles `piece` at a time; finish(first tile, tiles, sums) gets every piece.
template <Format format, class FirstTile, class Finish>
void multiply_pieces(Cta& cta, Step& step, const Matrix& matrix, const Activations& x, FirstTile first, int unit,
                     int piece, Finish&& finish) {
  CtaSpace& space = step.space.of(cta);
  const u8* tiles = step.args.image + matrix.offset;
  cta.share(first, piece, [&](int begin, int end) {
    const int tile = begin * unit, count = std::min(end * unit, matrix.num_tiles) - tile;
    with_format<format>(matrix, [&](auto stored) {
      multiply<stored()>(tiles + tile * matrix.tile_bytes, matrix.tile_bytes, count, matrix.cols, x, space.unpacked,
                         space.sums);
    });
    finish(tile, count, Sums{space.sums, x.tokens});
  });
}

// The same, tile by tile: finish(tile, token, sums [16]).
template <Format format, class Finish>
void multiply_tiles(Cta& cta, Step& step, const Matrix& matrix, const Activations& x, Finish&& finish) {
  const auto first = [&](int owner) { return first_tile(matrix, owner); };
  const int at_once = x.tokens <= max_tokens ? tiles_at_once<format>(x.tokens) : 1;
  multiply_pieces<format>(cta, step, matrix, x, first, 1, max_tiles / at_once * at_once, [&](int tile, int count, Sums sums) {
    for (int i = 0; i < count; ++i)
      for (int token = 0; token < x.tokens; ++token) finish(tile + i, token, sums.of(i, token));
  });
}
