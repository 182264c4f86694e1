// Tiles of a weight matrix times the rows (tokens) of a step: weights are read once, whatever the
// number of tokens.
//
// Every (row, token) has one accumulator that runs over the columns in ascending order: floats by
// fused multiply-adds, integers by exact sums of a group, added group by group. The result is
// therefore the same for one token, a batch or a prompt, however the loops are cut.
#pragma once

#include <algorithm>
#include <type_traits>

#include "activations.h"

// Tokens that one pass over the weights serves from registers.
inline constexpr int max_tokens = simd::accumulators / (simd::lanes == 16 ? 2 : simd::tile_vectors);
inline constexpr int column_block = 256;  // columns that stay in the first-level cache between two passes
inline constexpr int max_tiles = 4;  // side by side when there are few tokens: more loads in flight
inline constexpr i64 unpacked_bytes = i64(column_block) * tile_rows * 4;
inline constexpr i64 second_level_bytes = 0;  // activations that may stay there

// Sums of tiles x tokens, in memory [tile][token][16 rows].
struct Sums {
  float* at;
  int tokens;

  float* of(int tile, int token) const { return at + (i64(tile) * tokens + token) * tile_rows; }
};

// Blocks of some tiles that lie `stride` bytes apart, and how far ahead of its use a line is fetched.
struct Blocks {
  const u8* at;
  i64 stride;
  int count;
  i64 ahead;
};

template <int tiles, int tokens>
using Registers = simd::F32[tiles][tokens][simd::tile_vectors];

template <int tiles, int tokens>
[[gnu::always_inline]] inline void load_sums(Registers<tiles, tokens>& acc, Sums sums, int token) {
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < simd::tile_vectors; ++v)
        acc[i][j][v] = simd::load(sums.of(i, token + j) + v * simd::lanes);
}

template <int tiles, int tokens>
[[gnu::always_inline]] inline void store_sums(const Registers<tiles, tokens>& acc, Sums sums, int token) {
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < simd::tile_vectors; ++v)
        simd::store(sums.of(i, token + j) + v * simd::lanes, acc[i][j][v]);
}

template <Format format, int odd, int tiles, int tokens>
[[gnu::always_inline]] inline void add_column(const u8* pair, i64 stride, const float* values,
                                              i64 value_stride, Registers<tiles, tokens>& acc) {
  using namespace simd;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) {
    F32 w[tile_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) w[v] = kept(load_column<format, odd>(pair + i * stride, v));
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      const F32 value = splat(values[j * value_stride + odd]);
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) acc[i][j][v] = fma(w[v], value, acc[i][j][v]);
    }
  }
}

// sums += blocks x columns `col` .. of tokens `token` ..
template <Format format, bool prefetch, int tiles, int tokens>
inline void add_float_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  constexpr Traits t = traits(format);
  constexpr int pair_bytes = t.block_bytes / t.block_cols * 2;
  Registers<tiles, tokens> acc;
  load_sums<tiles, tokens>(acc, sums, token);
  const float* values = x.values + token * x.stride + col;
  const u8* pair = blocks.at;
  for (int left = blocks.count * t.block_cols / 2; left > 0; --left, pair += pair_bytes, values += 2) {
    if (prefetch)
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 2
      for (int line = 0; line < pair_bytes; line += 64)
        __builtin_prefetch(pair + i * blocks.stride + blocks.ahead + line);
    add_column<format, 0, tiles, tokens>(pair, blocks.stride, values, x.stride, acc);
    add_column<format, 1, tiles, tokens>(pair, blocks.stride, values, x.stride, acc);
  }
  store_sums<tiles, tokens>(acc, sums, token);
}

// The sums of one group: exact integers.
template <int tiles, int tokens>
using Totals = simd::I32[tiles][tokens][simd::tile_vectors];

// One pair of columns; `codes` are the activations of the first of its 8 columns.
template <Format format, bool unpacked, int pair, int tiles, int tokens>
[[gnu::always_inline]] inline void add_pair(const u8* eight, i64 stride, const i16* codes,
                                            i64 code_stride, Totals<tiles, tokens>& totals) {
  using namespace simd;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) {
    I32 w[tile_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v)
      w[v] = kept(load_pair<format, unpacked, pair>(eight + i * stride, v));
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      const I32 both = splat_i32(*(const i32*)(codes + j * code_stride + 2 * pair));
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) totals[i][j][v] = kept(dot(totals[i][j][v], w[v], both));
    }
  }
}

template <Format format, bool unpacked, int tiles, int tokens>
[[gnu::always_inline]] inline void add_eight(const u8* eight, i64 stride, const i16* codes,
                                             i64 code_stride, Totals<tiles, tokens>& totals) {
  add_pair<format, unpacked, 0, tiles, tokens>(eight, stride, codes, code_stride, totals);
  add_pair<format, unpacked, 1, tiles, tokens>(eight, stride, codes, code_stride, totals);
  add_pair<format, unpacked, 2, tiles, tokens>(eight, stride, codes, code_stride, totals);
  add_pair<format, unpacked, 3, tiles, tokens>(eight, stride, codes, code_stride, totals);
}

// One token and int4: the codes in the upper half of each byte are not shifted down but summed
// apart, 16 times too large, which saves half of the work of unpacking.
template <int tiles>
[[gnu::always_inline]] inline void add_nibbles(const u8* eight, i64 stride, const i16* codes,
                                               Totals<tiles, 1>& ones, Totals<tiles, 1>& sixteens) {
  using namespace simd;
  const I32 low = splat_i32(0x000f000f), high = splat_i32(0x00f000f0);
  I32 both[4];
#pragma GCC unroll 4
  for (int pair = 0; pair < 4; ++pair) both[pair] = splat_i32(*(const i32*)(codes + 2 * pair));
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) {
      const I32 word = kept(load_i32((const u32*)(eight + i * stride) + v * lanes));
      const I32 upper = shift_right_i16<8>(word);
      ones[i][0][v] = kept(dot(ones[i][0][v], bit_and(word, low), both[0]));
      sixteens[i][0][v] = kept(dot(sixteens[i][0][v], bit_and(word, high), both[1]));
      ones[i][0][v] = kept(dot(ones[i][0][v], bit_and(upper, low), both[2]));
      sixteens[i][0][v] = kept(dot(sixteens[i][0][v], bit_and(upper, high), both[3]));
    }
}

// totals of one group: `cols` columns of codes that start at `codes_at`.
template <Format format, bool unpacked, int tiles, int tokens>
[[gnu::always_inline]] inline void add_group(const u8* at, i64 stride, int cols, const i16* codes,
                                             i64 code_stride, Totals<tiles, tokens>& totals) {
  using namespace simd;
  constexpr int step = eight_bytes(format, unpacked);
  if constexpr (is_int4(format) && !unpacked && tokens == 1) {
    Totals<tiles, 1> sixteens;
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) sixteens[i][0][v] = zero_i32();
    for (int c = 0; c < cols; c += 8, at += step) add_nibbles<tiles>(at, stride, codes + c, totals, sixteens);
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v)
        totals[i][0][v] = add_i32(totals[i][0][v], shift_right_i32<4>(sixteens[i][0][v]));
  } else {
    for (int c = 0; c < cols; c += 8, at += step)
      add_eight<format, unpacked, tiles, tokens>(at, stride, codes + c, code_stride, totals);
  }
}

// sums += blocks x columns `col` .. of tokens `token` ..; `unpacked_codes` replaces the blocks' codes.
template <Format format, bool unpacked, int tiles, int tokens>
inline void add_integer_products(Blocks blocks, const u8* unpacked_codes, const Activations& x,
                                 int token, int col, Sums sums) {
  using namespace simd;
  constexpr Traits t = traits(format);
  constexpr int group_blocks = t.group_cols / t.block_cols;
  const i16* codes = x.codes + token * x.stride + col;
  int group = col / t.group_cols;
  for (int b = 0; b < blocks.count; b += group_blocks, ++group, codes += t.group_cols) {
    const u8* block = blocks.at + i64(b) * t.block_bytes;
    const int cols = std::min(group_blocks, blocks.count - b) * t.block_cols;
    Totals<tiles, tokens> totals;
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i) {
      if constexpr (!unpacked)
#pragma GCC unroll 8
        for (int line = 0; line < group_blocks * t.block_bytes; line += 64)
          __builtin_prefetch(block + i * blocks.stride + blocks.ahead + line);
#pragma GCC unroll 16
      for (int j = 0; j < tokens; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v)
          totals[i][j][v] = t.group_scales && !unpacked ? splat_i32(x.offsets[(token + j) * x.groups + group])
                                                        : zero_i32();
    }
    const u8* at = unpacked ? unpacked_codes + i64(b) * t.block_cols * 2 * tile_rows : block + t.scale_bytes;
    add_group<format, unpacked, tiles, tokens>(at, blocks.stride, cols, codes, x.stride, totals);
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < tokens; ++j) {
        // The float sums stay in memory: the registers belong to the totals.
        float* at_sums = sums.of(i, token + j);
        const F32 scale = splat(x.scales[(token + j) * x.groups + group]);
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) {
          F32 total = to_f32(totals[i][j][v]), weight_scale = scale;
          if constexpr (t.group_scales) {
            total = mul(total, scale);
            weight_scale = load_f16((const u16*)(block + i * blocks.stride) + v * lanes);
          }
          store(at_sums + v * lanes, fma(total, weight_scale, load(at_sums + v * lanes)));
        }
      }
  }
}

// The blocks of one tile as floats [col][16 rows] or as pairs of i16 [col pair][16 rows].
template <Format format>
inline void unpack(const u8* block, int count, const u8* next, u8* out) {
  using namespace simd;
  constexpr Traits t = traits(format);
  for (int b = 0; b < count; ++b, block += t.block_bytes, next += t.block_bytes) {
#pragma GCC unroll 8
    for (int line = 0; line < t.block_bytes; line += 64) __builtin_prefetch(next + line);
    if constexpr (is_float(format)) {
      constexpr int pair_bytes = t.block_bytes / t.block_cols * 2;
      for (int c = 0; c < t.block_cols; c += 2, out += 8 * tile_rows)
        for (int v = 0; v < tile_vectors; ++v) {
          const u8* pair = block + c / 2 * pair_bytes;
          store((float*)out + v * lanes, load_column<format, 0>(pair, v));
          store((float*)out + tile_rows + v * lanes, load_column<format, 1>(pair, v));
        }
    } else {
      const I32 zero_code = splat_i32(is_int4(format) ? 0x00080008 : 0);
      const u8* eight = block + t.scale_bytes;
      for (int c = 0; c < t.block_cols; c += 8, out += 16 * tile_rows, eight += eight_bytes(format, false))
        for (int v = 0; v < tile_vectors; ++v) {
          u32* at = (u32*)out + v * lanes;
          store_i32(at, sub_i16(load_pair<format, false, 0>(eight, v), zero_code));
          store_i32(at + tile_rows, sub_i16(load_pair<format, false, 1>(eight, v), zero_code));
          store_i32(at + 2 * tile_rows, sub_i16(load_pair<format, false, 2>(eight, v), zero_code));
          store_i32(at + 3 * tile_rows, sub_i16(load_pair<format, false, 3>(eight, v), zero_code));
        }
    }
  }
}

// Calls function(integral_constant<tokens>) for tokens = 1 .. most.
template <int most, class Function>
[[gnu::always_inline]] inline void with_tokens(int tokens, Function&& function) {
  if constexpr (most > 0) {
    if (tokens == most) return function(std::integral_constant<int, most>{});
    with_tokens<most - 1>(tokens, function);
  }
}

// Tiles side by side that the registers hold.
template <Format format>
constexpr int tiles_at_once(int tokens) {
  const int sums = simd::tile_vectors * tokens * (is_int4(format) ? 2 : 1);
  return sums * 4 <= simd::accumulators ? 4 : sums * 2 <= simd::accumulators ? 2 : 1;
}

// Bytes between the use of a line and its fetch: about the memory's latency, split over the tiles.
template <Format format>
constexpr i64 fetch_ahead(int tiles) { return tiles == 4 ? 512 : 1024; }

template <Format format, int tiles, int tokens>
inline void add_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  if constexpr (is_float(format))
    add_float_products<format, true, tiles, tokens>(blocks, x, token, col, sums);
  else
    add_integer_products<format, false, tiles, tokens>(blocks, nullptr, x, token, col, sums);
}

// Few tokens: one pass over the weights, straight from memory.
template <Format format, int tokens>
inline void multiply_in_registers(const u8* first_tile, i64 tile_bytes, int tiles, int blocks,
                                  const Activations& x, Sums sums) {
  constexpr int at_once = tiles_at_once<format>(tokens);
  int tile = 0;
  for (; tile + at_once <= tiles; tile += at_once)
    add_products<format, at_once, tokens>(
        {first_tile + tile * tile_bytes, tile_bytes, blocks, fetch_ahead<format>(at_once)}, x, 0, 0,
        {sums.of(tile, 0), tokens});
  if constexpr (at_once > 1)
    for (; tile < tiles; ++tile)
      add_products<format, 1, tokens>({first_tile + tile * tile_bytes, tile_bytes, blocks, fetch_ahead<format>(1)},
                                      x, 0, 0, {sums.of(tile, 0), tokens});
}

// More tokens: a block of columns in the first-level cache serves all of them, max_tokens in a pass.
// It is unpacked once, but for float weights and two passes: there unpacking costs more than it saves.
template <Format format>
inline void multiply_block(const u8* at, int count, const u8* next, const Activations& x, int col, u8* unpacked,
                           Sums sums) {
  const int passes = (x.tokens + max_tokens - 1) / max_tokens, f32_blocks = count * traits(format).block_cols / 16;
  const bool direct = is_float(format) && passes <= 2;
  if (!direct) unpack<format>(at, count, next, unpacked);
  for (int pass = 0; pass < passes; ++pass) {
    const int token = x.tokens * pass / passes, end = x.tokens * (pass + 1) / passes;
    with_tokens<max_tokens>(end - token, [&](auto tokens) {
      if constexpr (!is_float(format))
        add_integer_products<format, true, 1, tokens()>({at, 0, count, 0}, unpacked, x, token, col, sums);
      else if (!direct)
        add_float_products<Format::f32, false, 1, tokens()>({unpacked, 0, f32_blocks, 0}, x, token, col, sums);
      else if (pass == 0)
        add_float_products<format, true, 1, tokens()>({at, 0, count, next - at}, x, token, col, sums);
      else
        add_float_products<format, false, 1, tokens()>({at, 0, count, 0}, x, token, col, sums);
    });
  }
}

template <Format format>
inline void multiply_in_blocks(const u8* first_tile, i64 tile_bytes, int tiles, int blocks,
                               const Activations& x, u8* unpacked, Sums sums) {
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
inline void multiply(const u8* first_tile, i64 tile_bytes, int tiles, int cols, const Activations& x,
                     u8* unpacked, float* out) {
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
