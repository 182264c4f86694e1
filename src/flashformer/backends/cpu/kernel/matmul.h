// Tiles of a weight matrix times the rows (tokens) of a step: weights are read once, whatever the
// number of tokens.
//
// Every (row, token) has one accumulator that runs over the columns in ascending order: floats by
// fused multiply-adds, integers by exact sums of a group, added group by group; the exceptions of
// bf16c come last. The result is therefore the same for one token, a batch or a prompt, however the
// loops are cut.
#pragma once

#include "products.h"

// Tokens that one pass over the weights serves from registers.
inline constexpr int max_tokens = simd::accumulators / (simd::lanes == 16 ? 2 : simd::tile_vectors);
inline constexpr int max_tiles = 4;  // side by side when there are few tokens: more loads in flight
inline constexpr int block_columns = 256;  // that stay near from pass to pass
inline constexpr i64 second_level_bytes = 256 << 10;  // activations that may stay there
// Tiles side by side when there are many tokens.
inline constexpr int many_tiles = simd::tile_vectors == 1 ? 2 : 1;
inline constexpr i64 unpacked_stride = i64(block_columns) * tile_rows * 2;
inline constexpr i64 unpacked_bytes = many_tiles * unpacked_stride;

// Calls function(integral_constant<tokens>) for tokens = least .. most.
template <int least, int most, class Function>
[[gnu::always_inline]] inline void with_tokens(int tokens, Function&& function) {
  if constexpr (least <= most) {
    if (tokens == most) return function(std::integral_constant<int, most>{});
    with_tokens<least, most - 1>(tokens, function);
  }
}

// Tiles side by side whose sums the registers hold. One token and int4 is bound by arithmetic: one
// tile keeps its operands in registers.
template <Format format>
constexpr int tiles_at_once(int tokens) {
  if (is_int4(format) && tokens == 1) return 1;
  return std::clamp(simd::accumulators / (simd::tile_vectors * tokens), 1, max_tiles);
}

template <Format format, int tiles, int tokens>
inline void multiply_side_by_side(const u8* tile, i64 tile_bytes, int cols, const Activations& x, Sums sums) {
  constexpr int ahead = tiles == 4 ? 512 : is_int4(format) ? 2048 : 1024;  // about the memory's latency
  const u8* at = tile + head_bytes(format, cols);
  const Blocks blocks{at, tile_bytes, num_blocks(format, cols), at + ahead, tile_bytes, step_bytes(format)};
  if constexpr (format == Format::bf16c)
    add_compact_products<tiles, tokens>(blocks, tile, x, sums);
  else
    add_products<format, Cache::first_level, tiles, tokens>(blocks, x, 0, 0, sums);
}

// Few tokens: one pass over the weights, straight from memory.
template <Format format, int tokens>
inline void multiply_in_registers(const u8* first_tile, i64 tile_bytes, int count, int cols, const Activations& x,
                                  Sums sums) {
  constexpr int at_once = tiles_at_once<format>(tokens);
  int tile = 0;
  const auto multiply = [&](auto tiles) {
    multiply_side_by_side<format, tiles(), tokens>(first_tile + tile * tile_bytes, tile_bytes, cols, x,
                                                   {sums.of(tile, 0), tokens});
  };
  for (; tile + at_once <= count; tile += at_once) multiply(std::integral_constant<int, at_once>{});
  if constexpr (at_once > 1)
    for (; tile < count; ++tile) multiply(std::integral_constant<int, 1>{});
}

// More tokens: a block of columns of some tiles stays in the caches and serves all of them, max_tokens
// in a pass. Meanwhile each pass fetches its part of the block at `next` (of the first tile).
template <Format format, int tiles>
inline void multiply_block(Blocks blocks, const u8* next, int next_bytes, const Activations& x, int col, Sums sums) {
  const int passes = (x.tokens + max_tokens - 1) / max_tokens;
  const int steps = blocks.count * traits(format).block_cols / traits(format).step_cols;
  blocks.ahead_step = next_bytes / passes / steps;
  for (int pass = 0; pass < passes; ++pass) {
    const int token = x.tokens * pass / passes, end = x.tokens * (pass + 1) / passes;
    blocks.ahead = next + next_bytes / passes * pass;
    with_tokens<(max_tokens + 1) / 2, max_tokens>(end - token, [&](auto tokens) {
      add_products<format, Cache::second_level, tiles, tokens()>(blocks, x, token, col, sums);
    });
  }
}

// The same for `count` blocks at `at`; bf16c is unpacked for it.
template <Format format, int tiles>
inline void multiply_block(const u8* tile, i64 tile_bytes, const u8* at, int count, const u8* next,
                           const Activations& x, int col, u8* unpacked, Sums sums) {
  const int next_bytes = count * traits(format).block_bytes;
  if constexpr (format == Format::bf16c) {
    for (int i = 0; i < tiles; ++i)
      unpack(tile + i * tile_bytes, at + i * tile_bytes, count, unpacked + i * unpacked_stride);
    const Blocks blocks{unpacked, unpacked_stride, count, nullptr, tile_bytes, 0};
    multiply_block<Format::bf16, tiles>(blocks, next, next_bytes, x, col, sums);
  } else {
    multiply_block<format, tiles>({at, tile_bytes, count, nullptr, tile_bytes, 0}, next, next_bytes, x, col, sums);
  }
}

template <Format format>
inline void multiply_in_blocks(const u8* first_tile, i64 tile_bytes, int count, int cols, const Activations& x,
                               u8* unpacked, Sums sums) {
  constexpr int block_cols = traits(format).block_cols, block_bytes = traits(format).block_bytes;
  constexpr int step = block_columns / block_cols;
  const int blocks = num_blocks(format, cols);
  const auto part = [&](int tile, int b, i64 to_next) {
    const auto multiply = [&](auto tiles) {
      const u8* start = first_tile + tile * tile_bytes;
      const u8* at = start + head_bytes(format, cols) + i64(b) * block_bytes;
      multiply_block<format, tiles()>(start, tile_bytes, at, std::min(step, blocks - b), at + to_next, x,
                                      b * block_cols, unpacked, {sums.of(tile, 0), x.tokens});
    };
    if (count - tile >= many_tiles) return multiply(std::integral_constant<int, many_tiles>{});
    for (; tile < count; ++tile) multiply(std::integral_constant<int, 1>{});
  };
  const i64 bytes = x.stride * x.tokens * i64(is_float(format) ? sizeof(float) : sizeof(i16));
  if (bytes <= second_level_bytes) {  // weights in the order of memory
    for (int tile = 0; tile < count; tile += many_tiles)
      for (int b = 0; b < blocks; b += step) part(tile, b, i64(step) * block_bytes);
  } else {  // a block of columns of the activations serves all tiles before the next comes in
    for (int b = 0; b < blocks; b += step)
      for (int tile = 0; tile < count; tile += many_tiles) part(tile, b, many_tiles * tile_bytes);
  }
}

inline void add_exceptions(const u8* tile, const Activations& x, Sums sums) {
  for_exceptions(tile, [&](int row, int col, float weight) {
    for (int token = 0; token < x.tokens; ++token) {
      float& sum = sums.of(0, token)[row];
      sum = std::fma(weight, x.values[token * x.stride + col], sum);
    }
  });
}

inline void scale_rows(const float* scales, int tokens, Sums sums) {
  for (int token = 0; token < tokens; ++token)
    for (int r = 0; r < tile_rows; ++r) sums.of(0, token)[r] *= scales[r];
}

// sums [count][x.tokens][16 rows] = tiles x activations. `unpacked` has room for unpacked_bytes.
template <Format format>
inline void multiply(const u8* first_tile, i64 tile_bytes, int count, int cols, const Activations& x, u8* unpacked,
                     float* out) {
  const Sums sums{out, x.tokens};
  std::fill_n(out, i64(count) * x.tokens * tile_rows, 0.0f);
  if (x.tokens <= max_tokens)
    with_tokens<1, max_tokens>(x.tokens, [&](auto tokens) {
      multiply_in_registers<format, tokens()>(first_tile, tile_bytes, count, cols, x, sums);
    });
  else
    multiply_in_blocks<format>(first_tile, tile_bytes, count, cols, x, unpacked, sums);
  for (int tile = 0; tile < count; ++tile) {
    const u8* start = first_tile + tile * tile_bytes;
    const Sums of_tile{sums.of(tile, 0), x.tokens};
    if constexpr (format == Format::bf16c) add_exceptions(start, x, of_tile);
    if constexpr (format == Format::int8)
      scale_rows((const float*)(start + tile_bytes) - tile_rows, x.tokens, of_tile);
  }
}
