// Runs of weights times the activations of 1 to 8 tokens, on the tensor cores: one specialisation a kind of number.
//
// Weights are operand A in fragment order (quant/layout.py), tokens the 8 columns of operand B. Of floats every column is a
// token. Of integers a token has two, the high and the low byte, so that five tokens or more take two products.
#pragma once
#include "stages.cuh"

constexpr int byte_sets = max_rows > 4 ? 2 : 1;  // of four tokens

// The lane's part of operand B in rows of activations. What it holds for tokens that do not exist reaches nobody, so
// lanes without a token load nothing.
template <class F, class X>
struct Operand {
  const u8* x;
  const u8* scales;        // of the tokens whose sums the lane has (integers)
  bool active[byte_sets];  // whether the lane has a token

  __device__ __forceinline__ Operand(const Cta& cta, const u8* rows) {
    const int column = cta.lane / 4;
    const int token = F::integer ? column / 2 : column;
    x = rows + token * X::stride + cta.lane % 4 * (F::bits == 16 ? 8 : 16) + (F::integer ? column % 2 * 8 : 0);
    scales = rows + min(cta.lane % 4, max_rows - 1) * X::stride + X::data_bytes;
#pragma unroll
    for (int set = 0; set < byte_sets; ++set) active[set] = token + 4 * set < cta.args.num_rows;
  }
  // Counted from another run on.
  __device__ __forceinline__ Operand from(int run) const {
    Operand other = *this;
    other.x += run * (F::run_cols * 2);
    other.scales += run * 4;
    return other;
  }
  __device__ __forceinline__ const u8* run(int i) const { return x + i * (F::run_cols * 2); }
  __device__ __forceinline__ float scale(int i, int set) const {
    return *reinterpret_cast<const float*>(scales + i * 4 + set * (4 * X::stride));
  }
  __device__ __forceinline__ uint2 bytes(int i, int step, int set) const {
    return *reinterpret_cast<const uint2*>(run(i) + step * 64 + set * (4 * X::stride));
  }
};

// Of a tile, in a warp. Lane: row lane / 4 (and + 8), tokens as operand B has columns.
template <class F, bool integer = F::integer>
struct Sums;

// The tile's scale of row lane % 16, for the finisher.
template <class F>
struct RowScale {
  float row_scale = 0;

  __device__ __forceinline__ void load_row_scale(const Cta& cta, const u8* scales) {
    row_scale = reinterpret_cast<const float*>(scales)[cta.lane % tile_rows] * (F::fp8 ? fp8_sums : 1.f);
  }
};

// --- floats ---

// Four chains of sums hide the latency of the tensor core.
template <class F>
struct Sums<F, false> : RowScale<F> {
  static constexpr int num_tokens = max_rows > 1 ? 2 : 1;  // of a lane
  float chain[4][4] = {};

  static __device__ __forceinline__ int token(int lane, int i) { return lane % 4 * 2 + i; }

  __device__ __forceinline__ float total(int i) const {
    return (chain[0][i] + chain[1][i]) + (chain[2][i] + chain[3][i]);
  }
  // Into a part: [max_rows][part_stride], times the tokens' factors.
  template <class Factors>
  __device__ __forceinline__ void leave(const Cta& cta, float* part, const Factors& factors) const {
    float* out = part + token(cta.lane, 0) * part_stride + cta.lane / 4;
    if (token(cta.lane, 0) >= max_rows) return;
#pragma unroll
    for (int i = 0; i < num_tokens; ++i) {
      out[i * part_stride] = factors.apply(i, total(i));
      out[i * part_stride + 8] = factors.apply(i, total(i + 2));
    }
  }
};

__device__ __forceinline__ void mma(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (config::weights_f16) {
    mma_f16(acc, a0, a1, a2, a3, b0, b1);
  } else {
    mma_bf16(acc, a0, a1, a2, a3, b0, b1);
  }
}

// Four e4m3 numbers as bf16, 2^-120 of their value (format.cuh): the first two, the other two.
__device__ __forceinline__ u32 fp8_front(u32 four) { return (four << 4 & 0x07f007f0u) | (four << 8 & 0x80008000u); }
__device__ __forceinline__ u32 fp8_back(u32 four) { return (four >> 4 & 0x07f007f0u) | (four & 0x80008000u); }

// The lane's parts of operands A and B of some neighbouring runs.
template <class F>
struct FloatRuns {
  static constexpr int num = config::arch >= 90 ? 4 : 1;  // without bulk copies the producer needs more registers
  struct alignas(F::fp8 ? 16 : 8) Columns {
    u32 w[F::fp8 ? 4 : 2];
  };
  Vec16 a[num];
  Columns b[num];

  template <class X>
  __device__ __forceinline__ void load(const Cta& cta, const u8* slot, const Operand<F, X>& x, int first, int end, int) {
#pragma unroll
    for (int i = 0; i < num; ++i) {
      if (first + i >= end) continue;
      a[i] = *reinterpret_cast<const Vec16*>(slot + (first + i) * F::run_bytes + cta.lane * 16);
      if (x.active[0]) b[i] = *reinterpret_cast<const Columns*>(x.run(first + i));
    }
  }
  __device__ __forceinline__ void multiply(Sums<F>& sums, int first, int end, int) const {
#pragma unroll
    for (int i = 0; i < num; ++i) {
      if (first + i >= end) continue;
      const u32(&w)[4] = a[i].w;
      if constexpr (F::fp8) {
        mma(sums.chain[i], fp8_front(w[0]), fp8_front(w[1]), fp8_back(w[0]), fp8_back(w[1]), b[i].w[0], b[i].w[1]);
        mma(sums.chain[i], fp8_front(w[2]), fp8_front(w[3]), fp8_back(w[2]), fp8_back(w[3]), b[i].w[2], b[i].w[3]);
      } else {
        mma(sums.chain[i], w[0], w[1], w[2], w[3], b[i].w[0], b[i].w[1]);
      }
    }
  }
};

// --- integers ---

template <class F>
struct Sums<F, true> : RowScale<F> {
  static constexpr int num_tokens = byte_sets;  // of a lane
  float row[byte_sets][2] = {};                 // rows lane / 4 and + 8

  static __device__ __forceinline__ int token(int lane, int set) { return lane % 4 + 4 * set; }

  template <class Factors>
  __device__ __forceinline__ void leave(const Cta& cta, float* part, const Factors& factors) const {
#pragma unroll
    for (int set = 0; set < byte_sets; ++set) {
      if (token(cta.lane, set) >= max_rows) break;
      float* out = part + token(cta.lane, set) * part_stride + cta.lane / 4;
      out[0] = factors.apply(set, row[set][0]);
      out[8] = factors.apply(set, row[set][1]);
    }
  }
};

// The lane's parts of a run of 128 columns, of which `blocks` exist: four steps of 32.
template <class F>
struct IntegerRun {
  static constexpr int num = 1;
  static constexpr int steps = F::run_cols / 32;
  static constexpr int words = F::bits / 2;  // codes of a step
  static constexpr int groups = F::group > 0 ? F::run_blocks : 1;
  static constexpr int group_steps = steps / groups;
  u32 code[steps * words];
  u32 scales[groups];  // float16 of the lane's two rows
  u32 zeros[groups];   // a byte each
  uint2 b[byte_sets][steps];
  float x_scale[byte_sets];

  template <class X>
  __device__ __forceinline__ void load(const Cta& cta, const u8* slot, const Operand<F, X>& x, int i, int end, int blocks) {
    if (i < 0 || i >= end) return;
    const u8* run = slot + i * F::run_bytes;
#pragma unroll
    for (int block = 0; block < F::run_blocks; ++block) {
      if (block < blocks) load_block(cta, run + block * F::block_bytes, block);
    }
#pragma unroll
    for (int set = 0; set < byte_sets; ++set) {
      x_scale[set] = x.scale(i, set);
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        if (step * 32 < blocks * F::block_cols && x.active[set]) b[set][step] = x.bytes(i, step, set);
      }
    }
  }
  __device__ __forceinline__ void load_block(const Cta& cta, const u8* at, int block) {
    constexpr int bytes = F::lane_bytes < 16 ? F::lane_bytes : 16;
    const u8* codes = at + F::block_scale_bytes + cta.lane * bytes;
    u32* to = code + block * (F::lane_bytes / 4);
#pragma unroll
    for (int j = 0; j < F::lane_bytes / bytes; ++j) {
      if constexpr (bytes == 16) {
        const Vec16 four = *reinterpret_cast<const Vec16*>(codes + j * 512);
#pragma unroll
        for (int w = 0; w < 4; ++w) to[j * 4 + w] = four.w[w];
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(codes);
        to[0] = two.x;
        to[1] = two.y;
      }
    }
    if constexpr (F::group > 0) scales[block] = *reinterpret_cast<const u32*>(at + cta.lane / 4 * 4);
    if constexpr (F::zeros) zeros[block] = *reinterpret_cast<const u16*>(at + 2 * tile_rows + cta.lane / 4 * 2);
  }

  // Operand A of a step. Codes of 4 bits become bytes of 16 times their value: a mask, and a shift for the lower half.
  __device__ __forceinline__ void expand(int step, u32 (&a)[4]) const {
    const u32* w = code + step * words;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half] = F::bits == 4 ? w[half] << 4 & 0xf0f0f0f0u : w[half];
      a[half + 2] = F::bits == 4 ? w[half] & 0xf0f0f0f0u : w[half + 2 & 3];
    }
  }

  __device__ __forceinline__ void multiply(Sums<F>& sums, int i, int end, int blocks) const {
    if (i < 0 || i >= end) return;
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      if (F::group > 0 && group >= blocks) break;
      int acc[byte_sets][4] = {};
      int total[byte_sets][4] = {};  // of the activations alone, in every row
#pragma unroll
      for (int step = group * group_steps; step < (group + 1) * group_steps; ++step) {
        if (step * 32 >= blocks * F::block_cols) break;
        u32 a[4];
        expand(step, a);
#pragma unroll
        for (int set = 0; set < byte_sets; ++set) {
          mma_s8(acc[set], a[0], a[1], a[2], a[3], b[set][step].x, b[set][step].y);
          if constexpr (F::zeros) {
            mma_s8(total[set], 0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u, b[set][step].x, b[set][step].y);
          }
        }
      }
#pragma unroll
      for (int set = 0; set < byte_sets; ++set) add(sums, group, set, acc[set], total[set]);
    }
  }

  // High and low bytes together: of 128 columns at most 2^29, exact. Then float32, in the order of the groups.
  __device__ __forceinline__ void add(Sums<F>& sums, int group, int set, const int (&acc)[4], const int (&total)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int sum = acc[2 * half] * 256 + acc[2 * half + 1];
      float scale = x_scale[set];
      if constexpr (F::zeros) {
        const int zero = static_cast<int>(zeros[group] >> 8 * half & 255) * 16 - 128;  // as codes: from -8, times 16
        sum -= zero * (total[0] * 256 + total[1]);
      }
      if constexpr (F::group > 0) scale *= cvt_f32_f16(static_cast<u16>(scales[group] >> 16 * half));
      sums.row[set][half] = fmaf(static_cast<float>(sum), scale, sums.row[set][half]);
    }
  }
};

template <class F, bool integer = F::integer>
struct RunsOfFormat {
  using type = FloatRuns<F>;
};
template <class F>
struct RunsOfFormat<F, true> {
  using type = IntegerRun<F>;
};
template <class F>
using RunsOf = typename RunsOfFormat<F>::type;

// Whether registers are left to load runs while others are multiplied.
template <class F>
constexpr bool loads_ahead = F::bits == 16 || (config::arch >= 90 && (byte_sets == 1 || !F::integer));

// `count` runs of weights times their columns. slot: the first of them; last_blocks: of the last.
template <class F, int count, int last_blocks, class X>
__device__ __forceinline__ void multiply_runs(const Cta& cta, Sums<F>& sums, const u8* slot, const Operand<F, X>& x) {
  using Runs = RunsOf<F>;
  constexpr int n = Runs::num;
  constexpr auto blocks_of = [](int run) { return run == count - 1 ? last_blocks : F::run_blocks; };
  if constexpr (loads_ahead<F>) {
    Runs even{}, odd{};
    even.load(cta, slot, x, 0, count, blocks_of(0));
#pragma unroll
    for (int run = 0; run < count; run += 2 * n) {
      odd.load(cta, slot, x, run + n, count, blocks_of(run + n));
      even.multiply(sums, run, count, blocks_of(run));
      even.load(cta, slot, x, run + 2 * n, count, blocks_of(run + 2 * n));
      odd.multiply(sums, run + n, count, blocks_of(run + n));
    }
  } else {
    static_assert(n == 1);
#pragma unroll 1
    for (int run = 0; run < count - 1; ++run) {
      Runs runs{};
      runs.load(cta, slot, x, run, count, F::run_blocks);
      runs.multiply(sums, run, count, F::run_blocks);
    }
    Runs last{};
    last.load(cta, slot, x, count - 1, count, last_blocks);
    last.multiply(sums, count - 1, count, last_blocks);
  }
}
