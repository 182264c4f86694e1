// The tokens' side of a matrix product: floats as they are, or 16-bit integers with a scale a group.
#pragma once

#include "formats.h"
#include "math.h"

// Largest code of a quantised activation. Sums of a group of 128 with 8-bit weights stay below 2^31.
inline constexpr int code_max = 32767;

// Columns between two tokens' rows: whole blocks of every format, and a little more, so that the same
// column of several tokens does not fall into the same set of the cache.
constexpr i64 row_stride(int cols) { return (cols + 127) / 128 * 128 + 36; }
constexpr i64 group_stride(int cols) { return (cols + 31) / 32 + 1; }

// Rows of activations; zeros follow the last column up to a whole block of the weights.
struct Activations {
  int tokens;
  i64 stride;  // columns from row to row
  const float* values;  // [tokens][stride]
  const i16* codes;  // [tokens][stride], instead of values
  const float* scales;  // [tokens][groups]
  const i32* offsets;  // [tokens][groups]: -8 x the group's sum of codes, for weights stored as code + 8
  i64 groups;  // groups from row to row
};

// Where `Activations` are built; as many rows as it was made for.
struct ActivationBuffer {
  float* values;
  i16* codes;
  float* scales;
  i32* offsets;
};

// One row: scale = largest magnitude / code_max, codes to the nearest, ties to even.
template <Format format>
inline void quantise_row(const float* x, int cols, i16* codes, float* scales, i32* offsets) {
  using namespace simd;
  constexpr int group_cols = traits(format).group_cols;
  for (int start = 0, group = 0; start < cols; start += group_cols, ++group) {
    F32 magnitude = zero(), poison = zero();  // NaN if any value is NaN or infinite
    for (int i = start; i < start + group_cols; i += lanes) {
      const F32 v = load(x + i);
      magnitude = max(magnitude, abs(v));
      poison = fma(v, zero(), poison);
    }
    const float largest_value = largest(magnitude);
    const F32 inverse = splat(largest_value > 0 ? float(code_max) / largest_value : 0.0f);
    I32 total = zero_i32();
    for (int i = start; i < start + group_cols; i += lanes) {
      const F32 scaled = mul(load(x + i), inverse);
      const I32 code = to_i32(max(splat(-code_max), min(splat(code_max), scaled)));
      total = add_i32(total, code);
      store_i16(codes + i, code);
    }
    scales[group] = largest_value / float(code_max) + sum(poison);
    offsets[group] = -8 * sum_i32(total);
  }
}
