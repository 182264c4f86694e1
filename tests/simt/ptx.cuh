// kernel/ptx.cuh for the fibers of threads.cuh, and what CUDA brings along.
#pragma once
#include "threads.cuh"  // before the generated header, whose words it defines

#include <config.h>

struct alignas(16) Vec16 {
  u32 w[4];
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};

template <class T>
T atomicAdd(T* p, T v) { return std::exchange(*p, *p + v); }
inline u32 atomicCAS(u32* p, u32 expected, u32 v) { return *p == expected ? std::exchange(*p, v) : *p; }
inline u64 __umul64hi(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
inline int __ffs(u32 v) { return __builtin_ffs(static_cast<int>(v)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline void __sincosf(float v, float* s, float* c) {
  *s = std::sin(v);
  *c = std::cos(v);
}
inline u32 __float_as_uint(float v) { return __builtin_bit_cast(u32, v); }
inline float __uint_as_float(u32 v) { return __builtin_bit_cast(float, v); }
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  u32 result = 0;
  for (int i = 0; i < 32; i += 8) {
    const u32 byte = selector >> i / 2 & 7;
    result |= ((byte < 4 ? x : y) >> byte % 4 * 8 & 255) << i;
  }
  return result;
}
inline void __nanosleep(u32) { simt::yield(); }
inline void __threadfence_system() {}

// --- mbarrier ---

// Addresses of shared memory count from here: it is static memory of the same library.
inline char shared_base;
inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const char*>(p) - &shared_base); }
inline char* at_shared_address(u32 address) { return &shared_base + static_cast<int>(address); }

namespace simt {

struct Mbarrier {
  u32 count : 15, pending : 15, phase : 1;
  int tx;  // bytes that are still to come in this phase

  void arrive(u32 arrivals, int bytes) {
    if (arrivals > pending) {
      std::fprintf(stderr, "more arrivals than a barrier expects\n");
      std::abort();
    }
    pending -= arrivals;
    tx += bytes;
    if (pending != 0 || tx != 0) return;
    phase ^= 1;
    pending = count;
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  if (copy.bar) copy.bar->arrive(0, -static_cast<int>(copy.bytes));
}

inline Mbarrier& barrier_at(u32 bar) { return *reinterpret_cast<Mbarrier*>(at_shared_address(bar)); }

constexpr u32 longest_copy = 6000;  // about six turns of three CTAs

}  // namespace simt

inline void mbarrier_init(u32 bar, u32 count) { simt::barrier_at(bar) = {count, count, 0, 0}; }
inline void mbarrier_arrive(u32 bar) { simt::barrier_at(bar).arrive(1, 0); }
constexpr int arriving_lanes = 1;
template <int count>
void mbarrier_arrive_warp(u32 bar, int lane) {
  if (lane < arriving_lanes) simt::barrier_at(bar).arrive(count, 0);
}
inline void mbarrier_arrive_expect_tx(u32 bar, u32 bytes) { simt::barrier_at(bar).arrive(1, bytes); }
inline bool mbarrier_test(u32 bar, u32 parity) {
  if (simt::barrier_at(bar).phase != parity) return true;
  simt::yield();
  return false;
}
inline bool mbarrier_try_wait(u32 bar, u32 parity) { return mbarrier_test(bar, parity); }
inline void fence_proxy_async() {}
inline void fence_mbarrier_init() {}

// Until it lands there is nothing but NaN.
inline void cp_async_bulk(u32 dst, const void* src, u32 bytes, u32 bar) {
  char* to = at_shared_address(dst);
  if (bytes % 16 != 0 || reinterpret_cast<u64>(src) % 16 != 0 || reinterpret_cast<u64>(to) % 16 != 0) {
    std::fprintf(stderr, "a bulk copy that is not aligned\n");
    std::abort();
  }
  std::memset(to, 0xff, bytes);
  const u64 due = simt::clock + simt::random(simt::longest_copy);
  simt::copy_later({due, to, static_cast<const char*>(src), bytes, &simt::barrier_at(bar)});
}

// --- memory shared between CTAs ---

inline void red_release_gpu_add(u32* p, u32 v) { *p += v; }
template <class T>
T load_after_others(const T* p) {
  simt::yield();
  return *static_cast<const volatile T*>(p);
}
inline u32 ld_acquire_gpu(const u32* p) { return load_after_others(p); }
inline u32 ld_relaxed_gpu(const u32* p) { return load_after_others(p); }
inline u64 ld_relaxed_gpu(const u64* p) { return load_after_others(p); }
inline void st_relaxed_gpu(u32* p, u32 v) { *p = v; }
inline void prefetch(const void*) {}
inline u32 ld_relaxed_sys(const u32* p) { return *static_cast<const volatile u32*>(p); }
inline void st_relaxed_sys(u32* p, u32 v) { *p = v; }
inline Vec16 ld_relaxed_gpu_b128(const void* p) {
  simt::yield();
  return *static_cast<const Vec16*>(p);
}
inline void st_relaxed_gpu_b128(void* p, const Vec16& v) { *static_cast<Vec16*>(p) = v; }
inline void st_relaxed_gpu_b64(void* p, u32 lo, u32 hi) { *static_cast<uint2*>(p) = {lo, hi}; }
inline float ld_cg_f32(const float* p) { return *p; }

// --- CTA ---

inline void bar_sync(int id, int threads) { simt::meet(simt::current->named_barriers[id], threads); }
inline void barrier_sync(int id, int threads) { bar_sync(id, threads); }
inline u64 globaltimer() { return simt::clock; }

inline bool agreed(bool v) { return __all_sync(~0u, v); }

// --- 16-bit floats ---

inline float ex2(float v) { return std::exp2(v); }
// To the nearest, ties to even.
inline u32 bf16_of(float v) {
  return v != v ? 0x7fff : (__float_as_uint(v) + 0x7fff + (__float_as_uint(v) >> 16 & 1)) >> 16;
}
inline float of_bf16(u32 bits) { return __uint_as_float(bits << 16); }
inline u32 cvt_bf16x2(float lo, float hi) { return bf16_of(lo) | bf16_of(hi) << 16; }
inline float cvt_f32_f16(u16 h) { return static_cast<float>(__builtin_bit_cast(_Float16, h)); }
inline u32 f16_of(float v) { return __builtin_bit_cast(u16, static_cast<_Float16>(v)); }
inline u32 cvt_f16x2(float lo, float hi) { return f16_of(lo) | f16_of(hi) << 16; }
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  const auto fma = [&](int shift) {
    return std::fma(of_bf16(a >> shift & 0xffff), of_bf16(b >> shift & 0xffff), of_bf16(c >> shift & 0xffff));
  };
  return cvt_bf16x2(fma(0), fma(16));
}

// --- tensor core: fragments as PTX ISA 9.7.14.5 has them ---

namespace simt {

// Of a float32 sum this many bits are lost: with some of them a sum in another order is soon another 16-bit number, too.
inline u32 lost_bits;
inline float kept(float sum) { return __uint_as_float(__float_as_uint(sum) >> lost_bits << lost_bits); }
inline int kept(int sum) { return sum; }

// D += A (16 rows) * B (8 columns); a word holds `per` neighbouring numbers of a row of A, or of a column of B. Sums in
// the order of the columns of A, then added to D.
template <int per, class Sum, class Number>
void mma(Sum (&d)[4], Number number, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  static_assert(sizeof(Sum) == 4);
  const auto multiply = [&](Table& table) {
    Sum a[16][8 * per], b[8 * per][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4 * per; ++i) {
        const int k = (lane % 4 + i / (2 * per) * 4) * per + i % per;
        a[lane / 4 + i / per % 2 * 8][k] = number(table.word[lane][i / (2 * per) * 2 + i / per % 2], i % per);
      }
      for (int i = 0; i < 2 * per; ++i) {
        b[(lane % 4 + i / per * 4) * per + i % per][lane / 4] = number(table.word[lane][4 + i / per], i % per);
      }
    }
    for (int row = 0; row < 16; ++row) {
      Sum sum[8] = {};
      for (int k = 0; k < 8 * per; ++k) {
        for (int col = 0; col < 8; ++col) sum[col] += a[row][k] * b[k][col];
      }
      for (int col = 0; col < 8; ++col) {
        table.result[row % 8 * 4 + col / 2][row / 8 * 2 + col % 2] = __builtin_bit_cast(u32, sum[col]);
      }
    }
  };
  const Table& table = together(multiply, a0, a1, a2, a3, b0, b1);
  for (int i = 0; i < 4; ++i) d[i] = kept(d[i] + __builtin_bit_cast(Sum, table.result[lane()][i]));
}

}  // namespace simt

inline void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const auto number = [](u32 word, int i) { return of_bf16(word >> 16 * i & 0xffff); };
  simt::mma<2>(d, number, a0, a1, a2, a3, b0, b1);
}
inline void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const auto number = [](u32 word, int i) { return cvt_f32_f16(static_cast<u16>(word >> 16 * i)); };
  simt::mma<2>(d, number, a0, a1, a2, a3, b0, b1);
}
inline void mma_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const auto number = [](u32 word, int i) { return static_cast<int>(static_cast<signed char>(word >> 8 * i)); };
  simt::mma<4>(d, number, a0, a1, a2, a3, b0, b1);
}
inline u32 redux_max(u32 v) {
  const auto largest = [](simt::Table& table) {
    for (int i = 0; i < 32; ++i) table.result[0][0] = max(i > 0 ? table.result[0][0] : 0, table.word[i][0]);
  };
  return simt::together(largest, v).result[0][0];
}
