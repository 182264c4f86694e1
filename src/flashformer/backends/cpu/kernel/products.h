// The inner loops of a matrix product: a few tiles times a few tokens, with the sums in registers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "activations.h"

// The cache into which weights are fetched ahead of their use.
enum class Cache {
  first_level,  // weights that are used once, in the order of memory
  second_level,  // weights of the next block of columns
};

// Sums of tiles x tokens, in memory [tile][token][16 rows].
struct Sums {
  float* at;
  int tokens;

  float* of(int tile, int token) const { return at + (i64(tile) * tokens + token) * tile_rows; }
};

// Blocks of some tiles that lie `stride` bytes apart. Meanwhile lines are fetched from `ahead` on, of
// tiles `ahead_stride` bytes apart, `ahead_step` bytes for each step of the inner loop.
struct Blocks {
  const u8* at;
  i64 stride;
  int count;
  const u8* ahead;
  i64 ahead_stride;
  int ahead_step;
};

template <Format format, Cache cache, int tiles>
[[gnu::always_inline]] inline void fetch_lines(const u8* ahead, i64 stride) {
  constexpr bool first = cache == Cache::first_level;
  constexpr int lines = first ? (step_bytes(format) + 63) / 64 : 1;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 4
    for (int line = 0; line < lines; ++line) __builtin_prefetch(ahead + i * stride + line * 64, 0, first ? 3 : 2);
}

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

// Tiles whose operands are in registers at once; they share a token's operand.
constexpr int operand_tiles(int tiles) { return simd::tile_vectors == 1 ? tiles : 1; }

// sums += weights x the tokens' value of one column; weight(tile, vector) loads.
template <int tiles, int tokens, class Weight>
[[gnu::always_inline]] inline void add_column(const float* values, i64 value_stride, Weight&& weight,
                                              Registers<tiles, tokens>& acc) {
  using namespace simd;
  constexpr int together = operand_tiles(tiles);
#pragma GCC unroll 8
  for (int first = 0; first < tiles; first += together) {
    F32 w[together][tile_vectors];
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) w[i][v] = kept(weight(first + i, v));
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      // A value that is used once is an operand of the multiply-add.
      const F32 splatted = splat(values[j * value_stride]), value = together > 1 ? kept(splatted) : splatted;
#pragma GCC unroll 8
      for (int i = 0; i < together; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) acc[first + i][j][v] = fma(w[i][v], value, acc[first + i][j][v]);
    }
  }
}

// sums += blocks x columns `col` .. of tokens `token` ..
template <Format format, Cache cache, int tiles, int tokens>
inline void add_float_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  Registers<tiles, tokens> acc;
  load_sums<tiles, tokens>(acc, sums, token);
  const float* values = x.values + token * x.stride + col;
  const u8 *pair = blocks.at, *ahead = blocks.ahead;
  for (int left = blocks.count * (traits(format).block_cols / 2); left > 0; --left) {
    fetch_lines<format, cache, tiles>(ahead, blocks.ahead_stride);
    const auto column = [&](auto odd) {
      add_column<tiles, tokens>(values + odd, x.stride, [&](int i, int v) {
        return load_column<format, odd()>(pair + i * blocks.stride, v);
      }, acc);
    };
    column(std::integral_constant<int, 0>{});
    column(std::integral_constant<int, 1>{});
    pair += step_bytes(format);
    ahead += blocks.ahead_step;
    values += 2;
  }
  store_sums<tiles, tokens>(acc, sums, token);
}

// The same for bf16c; `tile` is the beginning of the first tile.
template <int tiles, int tokens>
inline void add_compact_products(Blocks blocks, const u8* tile, const Activations& x, Sums sums) {
  using namespace simd;
  constexpr Format format = Format::bf16c;
  Registers<tiles, tokens> acc;
  load_sums<tiles, tokens>(acc, sums, 0);
  I32 tables[tiles];
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) tables[i] = load_table(tile + i * blocks.stride);
  const float* values = x.values;
  const u8 *eight = blocks.at, *ahead = blocks.ahead;
  for (int left = blocks.count * (traits(format).block_cols / 8); left > 0; --left) {
    fetch_lines<format, Cache::first_level, tiles>(ahead, blocks.ahead_stride);
    I32 pairs[tiles][tile_vectors][4];
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) load_compact(eight + i * blocks.stride, v, tables[i], pairs[i][v]);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c)
      add_column<tiles, tokens>(values + c, x.stride, [&](int i, int v) {
        return c % 2 ? high_bf16(pairs[i][v][c / 2]) : low_bf16(pairs[i][v][c / 2]);
      }, acc);
    eight += step_bytes(format);
    ahead += blocks.ahead_step;
    values += 8;
  }
  store_sums<tiles, tokens>(acc, sums, 0);
}

// The sums of one group: exact integers.
template <int tiles, int tokens>
using Totals = simd::I32[tiles][tokens][simd::tile_vectors];

// One pair of columns, likewise; `codes` are the tokens' activations of it.
template <int tiles, int tokens, class Weight>
[[gnu::always_inline]] inline void add_pair(const i16* codes, i64 code_stride, Weight&& weight,
                                            Totals<tiles, tokens>& totals) {
  using namespace simd;
  constexpr int together = operand_tiles(tiles);
#pragma GCC unroll 8
  for (int first = 0; first < tiles; first += together) {
    I32 w[together][tile_vectors];
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) w[i][v] = kept(weight(first + i, v));
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      const I32 splatted = splat_i32(*(const i32*)(codes + j * code_stride));
      const I32 both = together > 1 ? kept(splatted) : splatted;
#pragma GCC unroll 8
      for (int i = 0; i < together; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v)
          totals[first + i][j][v] = kept(dot(totals[first + i][j][v], w[i][v], both));
    }
  }
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

// A whole group of int4 for one token.
template <Format format, int tiles>
[[gnu::always_inline]] inline void add_nibble_group(const Blocks& blocks, const u8* eight, const i16* codes,
                                                    Totals<tiles, 1>& totals) {
  using namespace simd;
  constexpr Traits t = traits(format);
  Totals<tiles, 1> sixteens;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) {
#pragma GCC unroll 16
    for (int line = 0; line < t.block_bytes; line += 64)
      __builtin_prefetch(eight - t.scale_bytes + (blocks.ahead - blocks.at) + i * blocks.stride + line);
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) sixteens[i][0][v] = zero_i32();
  }
  for (int c = 0; c < t.block_cols; c += 8, eight += step_bytes(format))
    add_nibbles<tiles>(eight, blocks.stride, codes + c, totals, sixteens);
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v)
      totals[i][0][v] = add_i32(totals[i][0][v], shift_right_i32<4>(sixteens[i][0][v]));
}

// sums += totals x the group's scales. The sums stay in memory: the registers belong to the totals.
template <Format format, int tiles, int tokens>
[[gnu::always_inline]] inline void add_totals(const Totals<tiles, tokens>& totals, const u8* block, i64 stride,
                                              const Activations& x, int token, int group, Sums sums) {
  using namespace simd;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      float* at = sums.of(i, token + j);
      const F32 scale = splat(x.scales[(token + j) * x.groups + group]);
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v, at += lanes) {
        const F32 total = to_f32(totals[i][j][v]);
        if constexpr (traits(format).group_scales) {
          const F32 weight_scale = load_f16((const u16*)(block + i * stride) + v * lanes);
          store(at, fma(mul(total, scale), weight_scale, load(at)));
        } else {
          store(at, fma(total, scale, load(at)));
        }
      }
    }
}

// sums += blocks x columns `col` .. of tokens `token` ..
template <Format format, Cache cache, int tiles, int tokens>
inline void add_integer_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  using namespace simd;
  constexpr Traits t = traits(format);
  constexpr int group_blocks = t.group_cols / t.block_cols;
  const i16* codes = x.codes + token * x.stride + col;
  const u8* ahead = blocks.ahead;
  int group = col / t.group_cols;
  for (int b = 0; b < blocks.count; b += group_blocks, ++group, codes += t.group_cols) {
    const u8* block = blocks.at + i64(b) * t.block_bytes;
    const u8* eight = block + t.scale_bytes;
    Totals<tiles, tokens> totals;
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < tokens; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v)
          totals[i][j][v] =
              is_int4(format) ? splat_i32(x.offsets[(token + j) * x.groups + group]) : zero_i32();
    if constexpr (is_int4(format) && tokens == 1) {
      add_nibble_group<format, tiles>(blocks, eight, codes, totals);
    } else {
      const int cols = std::min(group_blocks, blocks.count - b) * t.block_cols;
      for (int c = 0; c < cols; c += 8) {
        fetch_lines<format, cache, tiles>(ahead, blocks.ahead_stride);
        const auto pair = [&](auto which) {
          add_pair<tiles, tokens>(codes + c + 2 * which, x.stride, [&](int i, int v) {
            return load_pair<format, which()>(eight + i * blocks.stride, v);
          }, totals);
        };
        pair(std::integral_constant<int, 0>{});
        pair(std::integral_constant<int, 1>{});
        pair(std::integral_constant<int, 2>{});
        pair(std::integral_constant<int, 3>{});
        eight += step_bytes(format);
        ahead += blocks.ahead_step;
      }
    }
    add_totals<format, tiles, tokens>(totals, block, blocks.stride, x, token, group, sums);
  }
}

template <Format format, Cache cache, int tiles, int tokens>
inline void add_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  if constexpr (is_float(format))
    add_float_products<format, cache, tiles, tokens>(blocks, x, token, col, sums);
  else
    add_integer_products<format, cache, tiles, tokens>(blocks, x, token, col, sums);
}

// `count` blocks of a tile of bf16c as blocks of bf16. `tile` is its beginning.
inline void unpack(const u8* tile, const u8* at, int count, u8* to) {
  using namespace simd;
  constexpr Traits t = traits(Format::bf16c);
  constexpr int pair_bytes = tile_rows * 4;
  const I32 table = load_table(tile);
  for (int left = count * (t.block_cols / 8); left > 0; --left, at += step_bytes(Format::bf16c), to += 4 * pair_bytes)
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) {
      I32 pairs[4];
      load_compact(at, v, table, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_i32(to + i * pair_bytes + v * i64(sizeof(I32)), pairs[i]);
    }
}
