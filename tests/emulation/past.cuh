// Stands in for the kernel's headers where prefill.cu runs on a CPU: one std::thread a CUDA thread, CTA after CTA.
#pragma once
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#include <config.h>

#include <barrier>
#include <bit>
#include <cmath>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec16 { u32 w[4]; };
struct alignas(8) uint2 { u32 x, y; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

constexpr int threads = 256;
constexpr int warp_size = 32;
struct Index { int x; };
inline thread_local Index threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> cta_barrier, warp_barrier[threads / warp_size];
inline float exchanged[threads];

inline void __syncthreads() { cta_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barrier[threadIdx.x / warp_size]->arrive_and_wait(); }

// In the order of the butterfly of shuffles.
inline float warp_sum(float v) {
  for (int d = warp_size / 2; d > 0; d /= 2) {
    exchanged[threadIdx.x] = v;
    __syncwarp();
    v += exchanged[threadIdx.x ^ d];
    __syncwarp();
  }
  return v;
}

inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __uint_as_float(u32 v) { return std::bit_cast<float>(v); }

inline u32 bf16_of(float v) {
  const u32 bits = std::bit_cast<u32>(v);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even; the tests have no NaN
}
inline u32 f16_of(float v) { return std::bit_cast<u16>(static_cast<_Float16>(v)); }
inline u32 cvt_bf16x2(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline u32 cvt_f16x2(float low, float high) { return f16_of(low) | f16_of(high) << 16; }
inline float cvt_f32_f16(u16 v) { return static_cast<float>(std::bit_cast<_Float16>(v)); }

constexpr int tile_rows = 16;
constexpr int head_dim_padded = (config::head_dim + 15) / 16 * 16;
constexpr int dim_blocks = head_dim_padded / 16;
constexpr u32 page_bytes = config::page_tokens * head_dim_padded * 2;
#include "offsets.inc"  // key_offset and value_offset of the kernel's own past.cuh
