// Tiles of a weight matrix times the rows (tokens) of a step: weights are read once, whatever the
// number of tokens.
//
// Every (row, token) has one accumulator that runs over the columns in ascending order: floats by
// fused multiply-adds, integers by exact sums of a group, added group by group. The result is
// therefore the same for one token, a batch or a prompt, however the loops are cut.
#pragma once

#include <type_traits>

#include "products.h"

// Tokens that one pass over the weights serves from registers.
inline constexpr int max_tokens = simd::accumulators / (simd::lanes == 16 ? 2 : simd::tile_vectors);
inline constexpr int column_block = 256;  // columns that stay in the first-level cache from pass to pass
inline constexpr int max_tiles = 4;  // side by side when there are few tokens: more loads in flight
inline constexpr i64 unpacked_bytes = i64(column_block) * tile_rows * 4;
inline constexpr i64 second_level_bytes = 256 << 10;  // activations that may stay there

// Calls function(integral_constant<tokens>) for tokens = 1 .. most.
template <int most, class Function>
[[gnu::always_inline]] inline void with_tokens(int tokens, Function&& function) {
  if constexpr (most > 0) {
    if (tokens == most) return function(std::integral_constant<int, most>{});
    with_tokens<most - 1>(tokens, function);
  }
}

// Tiles side by side that the registers hold. One token and int4 is bound by arithmetic: one tile
// keeps its operands in registers.
template <Format format>
constexpr int tiles_at_once(int tokens) {
  const int sums = simd::tile_vectors * tokens;
  if (is_int4(format) && tokens == 1) return 1;
  return sums * 4 <= simd::accumulators ? 4 : sums * 2 <= simd::accumulators ? 2 : 1;
}

template <Format format, int tiles, int tokens>
inline void multiply_side_by_side(const u8* tile, i64 tile_bytes, int blocks, const Activations& x, Sums sums) {
  constexpr int ahead = tiles == 4 ? 512 : is_int4(format) ? 2048 : 1024;  // about the memory's latency
  add_products<format, Source::packed, tiles, tokens>(
      {tile, tile_bytes, blocks, tile + ahead, step_bytes(format), nullptr}, x, 0, 0, sums);
}

// Few tokens: one pass over the weights, straight from memory.
template <Format format, int tokens>
inline void multiply_in_registers(const u8* first_tile, i64 tile_bytes, int tiles, int blocks, const Activations& x,
                                  Sums sums) {
  constexpr int at_once = tiles_at_once<format>(tokens);
  int tile = 0;
  for (; tile + at_once <= tiles; tile += at_once)
    multiply_side_by_side<format, at_once, tokens>(first_tile + tile * tile_bytes, tile_bytes, blocks, x,
                                                   {sums.of(tile, 0), tokens});
  if constexpr (at_once > 1)
    for (; tile < tiles; ++tile)
      multiply_side_by_side<format, 1, tokens>(first_tile + tile * tile_bytes, tile_bytes, blocks, x,
                                               {sums.of(tile, 0), tokens});
}

// More tokens: a block of columns in the first-level cache serves all of them, max_tokens in a pass.
// The first pass leaves the weights unpacked; each pass fetches its part of the block at `next`.
template <Format format>
inline void multiply_block(const u8* at, int count, const u8* next, const Activations& x, int col, u8* unpacked,
                           Sums sums) {
  const int passes = (x.tokens + max_tokens - 1) / max_tokens, bytes = count * traits(format).block_bytes;
  const int steps = count * traits(format).block_cols / (is_float(format) ? 2 : 8);
  for (int pass = 0; pass < passes; ++pass) {
    const int token = x.tokens * pass / passes, end = x.tokens * (pass + 1) / passes;
    const Blocks blocks{at, 0, count, next + bytes / passes * pass, bytes / passes / steps, unpacked};
    with_tokens<max_tokens>(end - token, [&](auto tokens) {
      if (pass == 0)
        add_products<format, Source::kept, 1, tokens()>(blocks, x, token, col, sums);
      else
        add_products<format, Source::unpacked, 1, tokens()>(blocks, x, token, col, sums);
    });
  }
}

template <Format format>
inline void multiply_in_blocks(const u8* first_tile, i64 tile_bytes, int tiles, int blocks, const Activations& x,
                               u8* unpacked, Sums sums) {
  constexpr Traits t = traits(format);
  constexpr int step = column_block / t.block_cols;
  const auto part = [&](int tile, int b, i64 to_next) {
    const u8* at = first_tile + tile * tile_bytes + i64(b) * t.block_bytes;
    multiply_block<format>(at, std::min(step, blocks - b), at + to_next, x, b * t.block_cols, unpacked,
                           {sums.of(tile, 0), x.tokens});
  };
  const i64 bytes = x.stride * x.tokens * i64(is_float(format) ? sizeof(float) : sizeof(i16));
  if (bytes <= second_level_bytes) {  // weights in the order of memory
    for (int tile = 0; tile < tiles; ++tile)
      for (int b = 0; b < blocks; b += step) part(tile, b, i64(step) * t.block_bytes);
  } else {  // a block of columns of the activations serves all tiles before the next comes in
    for (int b = 0; b < blocks; b += step)
      for (int tile = 0; tile < tiles; ++tile) part(tile, b, tile_bytes);
  }
}

// sums [tiles][x.tokens][16 rows] = tiles x activations. `unpacked` has room for unpacked_bytes.
template <Format format>
inline void multiply(const u8* first_tile, i64 tile_bytes, int tiles, int cols, const Activations& x, u8* unpacked,
                     float* out) {
  const Sums sums{out, x.tokens};
  const int blocks = num_blocks(format, cols);
  std::fill_n(out, i64(tiles) * x.tokens * tile_rows, 0.0f);
  if (x.tokens <= max_tokens)
    with_tokens<max_tokens>(x.tokens, [&](auto tokens) {
      multiply_in_registers<format, tokens()>(first_tile, tile_bytes, tiles, blocks, x, sums);
    });
  else
    multiply_in_blocks<format>(first_tile, tile_bytes, tiles, blocks, x, unpacked, sums);
  if constexpr (format == Format::int8)
    for (int tile = 0; tile < tiles; ++tile) {
      const float* scales = (const float*)(first_tile + (tile + 1) * tile_bytes) - tile_rows;
      for (int token = 0; token < x.tokens; ++token)
        for (int r = 0; r < tile_rows; ++r) sums.of(tile, token)[r] *= scales[r];
    }
}
