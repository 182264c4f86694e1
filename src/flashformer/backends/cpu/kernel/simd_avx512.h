// Vectors of 16: AVX-512 (F, BW, VL, DQ), with VNNI where the machine has it. See simd.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace simd {

inline constexpr int lanes = 16;
inline constexpr int accumulators = 24;
using F32 = __m512;
using I32 = __v16si;  // not __m512i, whose arrays g++ keeps in memory

inline __m512i raw(I32 v) { return (__m512i)v; }
inline I32 wrap(__m512i v) { return (I32)v; }

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 splat(float v) { return _mm512_set1_ps(v); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline F32 zero_where_below(F32 v, F32 x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), v);
}
inline bool any_at_least(F32 v, float limit) {
  return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_NLT_UQ) != 0;
}
inline float sum(F32 v) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(F32 v) { return _mm512_reduce_max_ps(v); }

inline F32 load_f16(const u16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline F32 low_bf16(I32 v) { return _mm512_castsi512_ps(_mm512_slli_epi32(raw(v), 16)); }
inline F32 high_bf16(I32 v) {
  return _mm512_castsi512_ps(_mm512_and_si512(raw(v), _mm512_set1_epi32(-65536)));
}

inline I32 zero_i32() { return wrap(_mm512_setzero_si512()); }
inline I32 splat_i32(i32 v) { return wrap(_mm512_set1_epi32(v)); }
inline I32 load_i32(const void* p) { return wrap(_mm512_loadu_si512(p)); }
inline void store_i32(void* p, I32 v) { _mm512_storeu_si512(p, raw(v)); }
inline I32 add_i32(I32 a, I32 b) { return wrap(_mm512_add_epi32(raw(a), raw(b))); }
inline I32 bit_and(I32 a, I32 b) { return wrap(_mm512_and_si512(raw(a), raw(b))); }
template <int bits>
inline I32 shift_right_i16(I32 v) { return wrap(_mm512_srli_epi16(raw(v), bits)); }
template <int bits>
inline I32 shift_right_i32(I32 v) { return wrap(_mm512_srai_epi32(raw(v), bits)); }
inline I32 load_table(const u8* p) { return wrap(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))); }
inline I32 look_up(I32 table, I32 v) { return wrap(_mm512_shuffle_epi8(raw(table), raw(v))); }
inline I32 zip_low(I32 a, I32 b) { return wrap(_mm512_unpacklo_epi8(raw(a), raw(b))); }
inline I32 zip_high(I32 a, I32 b) { return wrap(_mm512_unpackhi_epi8(raw(a), raw(b))); }
inline I32 load_i8(const u8* p) {
  return wrap(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)));
}
inline I32 dot(I32 sum, I32 a, I32 b) {
#ifdef __AVX512VNNI__
  return wrap(_mm512_dpwssd_epi32(raw(sum), raw(a), raw(b)));
#else
  return wrap(_mm512_add_epi32(raw(sum), _mm512_madd_epi16(raw(a), raw(b))));
#endif
}
inline F32 to_f32(I32 v) { return _mm512_cvtepi32_ps(raw(v)); }
inline I32 to_i32(F32 v) { return wrap(_mm512_cvtps_epi32(v)); }
inline F32 scale_by_power(F32 v, I32 n) {
  const __m512i exponent = _mm512_slli_epi32(raw(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), exponent));
}
inline i32 sum_i32(I32 v) { return _mm512_reduce_add_epi32(raw(v)); }
inline void store_i16(i16* p, I32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(raw(v)));
}
inline I32 kept(I32 v) {
  asm("" : "+v"(v));
  return v;
}
inline F32 kept(F32 v) {
  asm("" : "+v"(v));
  return v;
}
inline void pause() { _mm_pause(); }

}  // namespace simd
