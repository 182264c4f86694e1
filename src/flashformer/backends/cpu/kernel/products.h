// The inner loops of a matrix product: a few tiles times a few tokens, with the sums in registers.
#pragma once

#include <algorithm>

#include "activations.h"

// Where the weights come from.
enum class Source {
  packed,  // as the image has them
  kept,  // likewise, and unpacked copies are left in a buffer
  unpacked,  // from that buffer: floats [col][16 rows], or pairs of i16 [col pair][16 rows]
};

// Sums of tiles x tokens, in memory [tile][token][16 rows].
struct Sums {
  float* at;
  int tokens;

  float* of(int tile, int token) const { return at + (i64(tile) * tokens + token) * tile_rows; }
};

// Blocks of some tiles that lie `stride` bytes apart. Meanwhile lines are fetched from `ahead` on,
// `ahead_step` bytes for each step of the inner loop: into the first-level cache from packed tiles,
// else into the second, and from there shortly before their use.
struct Blocks {
  const u8* at;
  i64 stride;
  int count;
  const u8* ahead;
  int ahead_step;
  u8* buffer;  // unpacked copies of one tile's blocks
};

// Bytes of one step of the inner loop: 2 columns of floats, 8 of integers.
constexpr int step_bytes(Format format) {
  const Traits t = traits(format);
  return is_float(format) ? t.block_bytes / t.block_cols * 2 : (t.block_bytes - t.scale_bytes) / t.block_cols * 8;
}

template <Format format, Source source, int tiles>
[[gnu::always_inline]] inline void fetch_lines(const u8* at, const u8* ahead, i64 stride) {
  if constexpr (source == Source::packed) {
#pragma GCC unroll 8
    for (int i = 0; i < tiles; ++i) {
      __builtin_prefetch(ahead + i * stride);
      if constexpr (step_bytes(format) > 64) __builtin_prefetch(ahead + i * stride + 64);
    }
  } else {
    __builtin_prefetch(ahead, 0, 2);
    if constexpr (source == Source::kept) __builtin_prefetch(at + 512);
  }
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

// One column of a pair; `values` are the tokens' activations of the pair.
template <Format format, Source source, int odd, int tiles, int tokens>
[[gnu::always_inline]] inline void add_column(const u8* pair, i64 stride, const float* values, i64 value_stride,
                                              float* buffer, Registers<tiles, tokens>& acc) {
  using namespace simd;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) {
    F32 w[tile_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) {
      w[v] = kept(source == Source::unpacked ? load(buffer + odd * tile_rows + v * lanes)
                                             : load_column<format, odd>(pair + i * stride, v));
      if constexpr (source == Source::kept) store(buffer + odd * tile_rows + v * lanes, w[v]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      const F32 value = splat(values[j * value_stride + odd]);
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) acc[i][j][v] = fma(w[v], value, acc[i][j][v]);
    }
  }
}

// sums += blocks x columns `col` .. of tokens `token` ..
template <Format format, Source source, int tiles, int tokens>
inline void add_float_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  Registers<tiles, tokens> acc;
  load_sums<tiles, tokens>(acc, sums, token);
  const float* values = x.values + token * x.stride + col;
  const u8 *pair = blocks.at, *ahead = blocks.ahead;
  float* buffer = (float*)blocks.buffer;
  for (int left = blocks.count * (traits(format).block_cols / 2); left > 0; --left) {
    fetch_lines<format, source, tiles>(pair, ahead, blocks.stride);
    add_column<format, source, 0, tiles, tokens>(pair, blocks.stride, values, x.stride, buffer, acc);
    add_column<format, source, 1, tiles, tokens>(pair, blocks.stride, values, x.stride, buffer, acc);
    pair += step_bytes(format);
    ahead += blocks.ahead_step;
    values += 2;
    buffer += 2 * tile_rows;
  }
  store_sums<tiles, tokens>(acc, sums, token);
}

// The sums of one group: exact integers.
template <int tiles, int tokens>
using Totals = simd::I32[tiles][tokens][simd::tile_vectors];

// One pair of columns; `codes` are the tokens' activations of the first of its 8 columns.
template <Format format, Source source, int pair, int tiles, int tokens>
[[gnu::always_inline]] inline void add_pair(const u8* eight, i64 stride, const i16* codes, i64 code_stride,
                                            u32* buffer, Totals<tiles, tokens>& totals) {
  using namespace simd;
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) {
    I32 w[tile_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v) {
      w[v] = kept(source == Source::unpacked ? load_i32(buffer + pair * tile_rows + v * lanes)
                                             : load_pair<format, pair>(eight + i * stride, v));
      if constexpr (source == Source::kept) store_i32(buffer + pair * tile_rows + v * lanes, w[v]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < tokens; ++j) {
      const I32 both = splat_i32(*(const i32*)(codes + j * code_stride + 2 * pair));
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) totals[i][j][v] = kept(dot(totals[i][j][v], w[v], both));
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
template <Format format, Source source, int tiles, int tokens>
inline void add_integer_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  using namespace simd;
  constexpr Traits t = traits(format);
  constexpr int group_blocks = t.group_cols / t.block_cols;
  const i16* codes = x.codes + token * x.stride + col;
  const u8* ahead = blocks.ahead;
  u32* buffer = (u32*)blocks.buffer;
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
    if constexpr (is_int4(format) && source == Source::packed && tokens == 1) {
      add_nibble_group<format, tiles>(blocks, eight, codes, totals);
    } else {
      const int cols = std::min(group_blocks, blocks.count - b) * t.block_cols;
      for (int c = 0; c < cols; c += 8) {
        fetch_lines<format, source, tiles>(eight, ahead, blocks.stride);
        const i16* some = codes + c;
        add_pair<format, source, 0, tiles, tokens>(eight, blocks.stride, some, x.stride, buffer, totals);
        add_pair<format, source, 1, tiles, tokens>(eight, blocks.stride, some, x.stride, buffer, totals);
        add_pair<format, source, 2, tiles, tokens>(eight, blocks.stride, some, x.stride, buffer, totals);
        add_pair<format, source, 3, tiles, tokens>(eight, blocks.stride, some, x.stride, buffer, totals);
        eight += step_bytes(format);
        ahead += blocks.ahead_step;
        buffer += 4 * tile_rows;
      }
    }
    add_totals<format, tiles, tokens>(totals, block, blocks.stride, x, token, group, sums);
  }
}

template <Format format, Source source, int tiles, int tokens>
inline void add_products(Blocks blocks, const Activations& x, int token, int col, Sums sums) {
  if constexpr (is_float(format))
    add_float_products<format, source, tiles, tokens>(blocks, x, token, col, sums);
  else
    add_integer_products<format, source, tiles, tokens>(blocks, x, token, col, sums);
}
