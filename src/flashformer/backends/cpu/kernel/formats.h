// What a tile's bytes mean: one row of traits a format, and loads that turn codes into vectors.
//
// A tile is 16 rows; its blocks lie along the columns: scales (if the format has groups), then codes
// in panel order, so that a vector holds neighbouring rows of one column (floats) or of one pair of
// columns (integers).
#pragma once

#include <config.h>

#include "simd.h"

using config::Format;

struct Traits {
  int block_cols;
  int scale_bytes;  // at the start of a block
  int block_bytes;
  int group_cols;  // columns that share an activation scale; 0: float activations
  bool group_scales;  // weights have a scale for each group, not for each row
  int step_cols;  // columns that are unpacked together
};

constexpr Traits traits(Format format) {
  switch (format) {
    case Format::f32: return {16, 0, 1024, 0, false, 2};
    case Format::bf16: return {16, 0, 512, 0, false, 2};
    case Format::bf16c: return {16, 0, 384, 0, false, 8};
    case Format::f16: return {16, 0, 512, 0, false, 2};
    case Format::int8: return {32, 0, 512, 128, false, 8};
    case Format::int4: return {32, 32, 288, 32, true, 8};
    case Format::int4g128: return {128, 32, 1056, 128, true, 8};
  }
  return {};
}

constexpr bool is_float(Format format) { return traits(format).group_cols == 0; }
constexpr bool is_int4(Format format) { return traits(format).group_scales; }
constexpr int num_blocks(Format format, int cols) {
  return (cols + traits(format).block_cols - 1) / traits(format).block_cols;
}

// Bytes of one step of the inner loops.
constexpr int step_bytes(Format format) {
  const Traits t = traits(format);
  return (t.block_bytes - t.scale_bytes) / t.block_cols * t.step_cols;
}

// What a tile of bf16c begins with: the upper bytes that its indices stand for, then the exceptions,
// weights with another upper byte: row after row, in the order of the columns. The code of an
// exception is +0. The head is padded to whole lines.
struct CompactHead {
  u8 table[16];
  u16 row_ends[tile_rows];  // of the exceptions
  struct Exception {
    u16 col;
    u16 bits;
  };
  const Exception* exceptions() const { return (const Exception*)(this + 1); }
};
inline constexpr int exception_weights = 512;  // one exception for so many weights has room

constexpr i64 head_bytes(Format format, int cols) {
  if (format != Format::bf16c) return 0;
  const i64 room = (i64(num_blocks(format, cols)) * 16 * tile_rows + exception_weights - 1) / exception_weights;
  return (i64(sizeof(CompactHead)) + i64(sizeof(CompactHead::Exception)) * room + 63) / 64 * 64;
}

// use(row, col, weight) for every exception of a tile.
template <class Use>
inline void for_exceptions(const u8* tile, Use&& use) {
  const auto& head = *(const CompactHead*)tile;
  for (int row = 0, i = 0; row < tile_rows; ++row)
    for (; i < head.row_ends[row]; ++i) use(row, head.exceptions()[i].col, from_bf16(head.exceptions()[i].bits));
}

// Rows vector * lanes .. of the four pairs of columns stored at `eight`, as words of two bf16. Indices
// of the first four columns are the lower halves of 64 bytes, of the others the upper halves; the
// lower bytes of the codes follow.
[[gnu::always_inline]] inline void load_compact(const u8* eight, int vector, simd::I32 table, simd::I32 (&pairs)[4]) {
  using namespace simd;
  const i64 at = vector * i64(sizeof(I32));
  const I32 indices = load_i32(eight + at), mask = splat_i32(0x0f0f0f0f);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const I32 index = bit_and(half == 0 ? indices : shift_right_i16<4>(indices), mask);
    const I32 upper = look_up(table, index), lower = load_i32(eight + (half + 1) * 64 + at);
    pairs[2 * half] = zip_low(lower, upper);
    pairs[2 * half + 1] = zip_high(lower, upper);
  }
}

// Rows vector * lanes .. of one column of the pair of columns that is stored at `pair`.
template <Format format, int odd>
[[gnu::always_inline]] inline simd::F32 load_column(const u8* pair, int vector) {
  using namespace simd;
  if constexpr (format == Format::f32) {
    return load((const float*)pair + odd * tile_rows + vector * lanes);
  } else if constexpr (format == Format::f16) {
    return load_f16((const u16*)pair + odd * tile_rows + vector * lanes);
  } else {
    const I32 both = load_i32((const u32*)pair + vector * lanes);
    return odd ? high_bf16(both) : low_bf16(both);
  }
}

// Rows vector * lanes .. of pair `pair` of the 8 columns stored at `eight`, as pairs of i16; int4
// codes stay unsigned (8 means 0).
template <Format format, int pair>
[[gnu::always_inline]] inline simd::I32 load_pair(const u8* eight, int vector) {
  using namespace simd;
  if constexpr (format == Format::int8) {
    return load_i8(eight + pair * 2 * tile_rows + vector * 2 * lanes);
  } else {
    const I32 word = load_i32((const u32*)eight + vector * lanes), mask = splat_i32(0x000f000f);
    if constexpr (pair == 0) return bit_and(word, mask);
    if constexpr (pair == 3) return shift_right_i16<12>(word);
    return bit_and(shift_right_i16<4 * pair>(word), mask);
  }
}

// One weight, for the embedding; exceptions are 0.
template <Format format>
inline float weight_at(const u8* tile, i64 tile_bytes, int cols, int row, int col) {
  constexpr Traits t = traits(format);
  const u8* block = tile + head_bytes(format, cols) + i64(col / t.block_cols) * t.block_bytes;
  const int c = col % t.block_cols;
  if constexpr (format == Format::bf16c) {
    const u8* eight = block + c / 8 * step_bytes(format);
    const int at = row / 4 * 16 + c % 4 / 2 * 8 + row % 4 * 2 + c % 2, half = c % 8 / 4;
    const u8 upper = ((const CompactHead*)tile)->table[eight[at] >> 4 * half & 15];
    return from_bf16(u16(upper << 8 | eight[(half + 1) * 64 + at]));
  }
  if constexpr (format == Format::f32) return ((const float*)block)[c * tile_rows + row];
  if constexpr (format == Format::f16) return from_f16(((const u16*)block)[c * tile_rows + row]);
  if constexpr (format == Format::bf16)
    return from_bf16(((const u16*)block)[c / 2 * 2 * tile_rows + 2 * row + c % 2]);
  if constexpr (format == Format::int8) {
    const float* row_scales = (const float*)(tile + tile_bytes) - tile_rows;
    return float(((const i8*)block)[c / 2 * 2 * tile_rows + 2 * row + c % 2]) * row_scales[row];
  }
  if constexpr (is_int4(format)) {
    const u32 word = ((const u32*)(block + t.scale_bytes))[c / 8 * tile_rows + row];
    const int code = word >> (c % 8 / 2 * 4 + c % 2 * 16) & 15;
    return float(code - 8) * from_f16(((const u16*)block)[row]);
  }
}
