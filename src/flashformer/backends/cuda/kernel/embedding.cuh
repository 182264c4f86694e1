// Weights of the embedding, one by one: a step reads so few of them that nothing else of this kernel would fit.
#pragma once
#include "stages.cuh"

using EmbeddingFormat = HeadFormat;

// Two neighbouring weights of a row of the embedding; `col` is even.
__device__ __forceinline__ float2 embedding_pair(const u8* table, int row, int col) {
  using F = EmbeddingFormat;
  using S = Stage<Kind::lm_head>;  // the same shape
  const int r = row % tile_rows;
  const u8* tile = table + u64(row / tile_rows) * S::tile_bytes;
  const u8* block = tile + col / F::block_cols * F::block_bytes;
  const u8* codes = block + F::block_scale_bytes;
  const int in_block = col % F::block_cols;
  if constexpr (F::bits == 4) {
    constexpr int steps = F::block_cols < 64 ? 1 : 2;  // of 32 columns, that a lane holds together
    const int lane = r % 8 * 4 + in_block % 32 / 8;
    const int load = in_block / 32 / steps;
    const int word = in_block / 32 % steps * 2 + r / 8;
    const u8* bytes = codes + load * 512 + lane * (8 * steps) + word * 4 + in_block % 4;
    const int shift = in_block % 8 / 4 * 4;
    const float scale = cvt_f32_f16(reinterpret_cast<const u16*>(block)[r % 8 * 2 + r / 8]);
    const int zero = F::zeros ? block[2 * tile_rows + r % 8 * 2 + r / 8] : 8;
    auto weight = [&](u8 two) { return static_cast<float>(static_cast<int>((two >> shift & 15) ^ 8) - zero) * scale; };
    return make_float2(weight(bytes[0]), weight(bytes[1]));
  } else {
    constexpr int word_cols = 32 / F::bits;
    const int lane = r % 8 * 4 + in_block / (2 * word_cols);
    const int word = in_block / word_cols % 2 * 2 + r / 8;
    const u8* at = codes + lane * 16 + word * 4;
    if constexpr (F::bits == 16) {
      float lo, hi;
      unpack_x(*reinterpret_cast<const u32*>(at), lo, hi);
      return make_float2(lo, hi);
    } else {
      const float scale = reinterpret_cast<const float*>(tile + S::tile_bytes - F::row_scale_bytes)[r];
      const int first = in_block % 4;
      if constexpr (F::fp8) {
        // e4m3 as the upper bits of a float32 are 2^-120 of their value; columns 0, 2, 1, 3 lie in a word.
        auto weight = [&](u8 code) {
          return __uint_as_float(u32(code & 0x7f) << 20 | u32(code & 0x80) << 24) * 0x1p120f * scale;
        };
        return make_float2(weight(at[first / 2]), weight(at[first / 2 + 2]));
      }
      auto weight = [&](u8 code) { return static_cast<float>(static_cast<signed char>(code)) * scale; };
      return make_float2(weight(at[first]), weight(at[first + 1]));
    }
  }
}
