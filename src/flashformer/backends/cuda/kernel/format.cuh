// How the weights of a format lie in a tile, and the activations that they are multiplied with in shared memory.
//
// quant/formats.py and quant/layout.py have the same numbers. 16-bit weights and fp8 multiply 16-bit floats; int8 and
// int4 multiply integers: the integer tensor cores take a fragment of 512 bytes as it lies there.
#pragma once
#include "packet.cuh"

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int bits_, bool floating_, int group_, bool zeros_>
struct Format {
  static constexpr int bits = bits_;
  static constexpr int group = group_;  // columns that share a scale of their row; 0: no group scales
  static constexpr bool zeros = zeros_;
  static constexpr bool fp8 = floating_ && bits == 8;
  static constexpr bool integer = !floating_;

  static constexpr int block_cols = group > 0 ? group : bits == 16 ? 16 : 32;
  static constexpr u32 block_scale_bytes = group > 0 ? (zeros ? 3 : 2) * tile_rows : 0;
  static constexpr u32 block_bytes = block_scale_bytes + tile_rows * block_cols * bits / 8;
  static constexpr int lane_bytes = block_cols * bits / 16;  // a lane's part of a block's codes
  static constexpr u32 row_scale_bytes = bits == 8 ? 4 * tile_rows : 0;

  // A run: the columns that a warp multiplies at once. Integers of a run share a scale.
  static constexpr int run_cols = integer ? 128 : bits == 16 ? 16 : 32;
  static constexpr int run_blocks = run_cols / block_cols;
  static constexpr u32 run_bytes = run_blocks * block_bytes;
};

using HalvesFormat = Format<16, true, 0, false>;
using BodyFormat = Format<config::body_bits, config::body_floating, config::body_group, config::body_zeros>;
using HeadFormat = Format<config::head_bits, config::head_floating, config::head_group, config::head_zeros>;

// Rows of activations in shared memory, [max_rows][stride] bytes: two bytes a column, then a float a run of integers.
template <class F, int runs>
struct Rows {
  static constexpr int packets = runs * F::run_cols / 8;
  static constexpr u32 data_bytes = packets * 16;
  // Tokens on different banks: lanes of two (16-bit weights: four) tokens read 64 (32) bytes each at once.
  static constexpr u32 stride = F::integer     ? (data_bytes + 4 * runs + 127) / 128 * 128 + 64
                                : F::bits == 8 ? data_bytes + 64
                                               : data_bytes + 32;
};

// The weights of fp8 become bf16 by a shift, 2^-120 of what they mean. Activations are 2^100 of theirs, so that products
// stay far from the smallest float32, and the sums get the rest with the row's scale.
constexpr float fp8_sums = 0x1p20f;
__device__ __forceinline__ u32 fp8_activations(u32 pair) { return fma_bf16x2(pair, 0x71807180u, 0x80008000u); }

// Activations as integers: 2^14 > |x| * 2^k >= 2^13 for the largest of a run, so that a bf16 down to 2^-6 of it is kept
// exactly and others lose at most 2^-14 of it. Rounding to bf16 has cost each of them up to 2^-9 of itself: in rows whose
// largest value is less than 2^5 of the typical one, the integers' error is below that of bf16 (docs/cuda-kernel.md).
// A number is 256 * high + low, in two columns of operand B; a packet holds the high bytes of its eight, then the low.
struct Integers {
  u32 exponent = 0;  // of the largest of the run, as float32 stores it; 255: not finite

  // `packet`: eight 16-bit numbers. The warp's halves hold a run each; all lanes call.
  __device__ __forceinline__ void look_at(const Cta& cta, const Vec16& packet) {
    u32 largest = 0;
#pragma unroll
    for (u32 pair : packet.w) {
      float lo, hi;
      unpack_x(pair, lo, hi);
      largest = max(largest, max(__float_as_uint(lo) & 0x7fffffffu, __float_as_uint(hi) & 0x7fffffffu));
    }
    const bool upper = cta.lane >= 16;
    const u32 low = redux_max(upper ? 0 : largest);
    const u32 high = redux_max(upper ? largest : 0);
    exponent = max((upper ? high : low) >> 23, 32u);  // below 2^-95 all is zero
  }
  __device__ __forceinline__ float factor() const { return __uint_as_float((127 + 127 + 13 - exponent) << 23); }
  template <class F>
  __device__ __forceinline__ float scale() const {
    constexpr u32 codes = F::bits == 4 ? 4 : 0;  // four-bit codes are multiplied as 16 times their value
    return __uint_as_float(exponent == 255 ? 0x7fffffffu : (exponent - 13 - codes) << 23);
  }
  // Four numbers: rounded to the nearest by adding 1.5 * 2^23, and 128, so that the byte above is that of the rest.
  static __device__ __forceinline__ void split(const float (&x)[4], float factor, u32& high, u32& low) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fmaf(x[i], factor, 12582912.f + 128.f));
    const u32 front = __byte_perm(bits[0], bits[1], 0x5140);
    const u32 back = __byte_perm(bits[2], bits[3], 0x5140);
    low = __byte_perm(front, back, 0x5410) ^ 0x80808080u;
    high = __byte_perm(front, back, 0x7632);
  }
};

// How a packet of eight activations becomes what F multiplies.
template <class F>
struct Conversion {
  Integers integers;

  // All lanes of a warp call, for neighbouring packets. The answers of several take as long as one's, so all are asked for
  // before the first is used.
  __device__ __forceinline__ void look_at(const Cta& cta, const Vec16& packet) {
    if constexpr (F::integer) integers.look_at(cta, packet);
  }

  // Into its row, as X says; a packet that is not `stored` holds zeros.
  template <class X>
  __device__ __forceinline__ void store(u8* row, int packet, Vec16 values, bool stored) const {
    if constexpr (F::fp8) {
#pragma unroll
      for (u32& pair : values.w) pair = fp8_activations(pair);
    }
    if constexpr (F::integer) {
      float x[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack_x(values.w[i], x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
      Integers::split(x[0], integers.factor(), values.w[0], values.w[2]);
      Integers::split(x[1], integers.factor(), values.w[1], values.w[3]);
      if (stored && packet % 16 == 0) {
        *reinterpret_cast<float*>(row + X::data_bytes + packet / 16 * 4) = integers.scale<F>();
      }
    }
    if (stored) *reinterpret_cast<Vec16*>(row + packet * 16) = values;
  }
};
