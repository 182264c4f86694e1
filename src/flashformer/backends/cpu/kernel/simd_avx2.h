// Vectors of 8: AVX2 with FMA and F16C. See simd.h for what each function promises.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace simd {

inline constexpr int lanes = 8;
inline constexpr int accumulators = 12;  // vectors of sums that fit in the registers beside operands
using F32 = __m256;
using I32 = __v8si;  // not __m256i, whose arrays g++ keeps in memory

inline __m256i raw(I32 v) { return (__m256i)v; }
inline I32 wrap(__m256i v) { return (I32)v; }

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 splat(float v) { return _mm256_set1_ps(v); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F32 zero_where_below(F32 v, F32 x, float limit) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ), v);
}
inline bool any_at_least(F32 v, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_NLT_UQ)) != 0;
}
inline float sum(F32 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(F32 v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline F32 load_f16(const u16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline F32 low_bf16(I32 v) { return _mm256_castsi256_ps(_mm256_slli_epi32(raw(v), 16)); }
inline F32 high_bf16(I32 v) {
  return _mm256_castsi256_ps(_mm256_and_si256(raw(v), _mm256_set1_epi32(-65536)));
}

inline I32 zero_i32() { return wrap(_mm256_setzero_si256()); }
inline I32 splat_i32(i32 v) { return wrap(_mm256_set1_epi32(v)); }
inline I32 load_i32(const void* p) { return wrap(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_i32(void* p, I32 v) { _mm256_storeu_si256((__m256i*)p, raw(v)); }
inline I32 add_i32(I32 a, I32 b) { return wrap(_mm256_add_epi32(raw(a), raw(b))); }
inline I32 bit_and(I32 a, I32 b) { return wrap(_mm256_and_si256(raw(a), raw(b))); }
template <int bits>
inline I32 shift_right_i16(I32 v) { return wrap(_mm256_srli_epi16(raw(v), bits)); }
template <int bits>
inline I32 shift_right_i32(I32 v) { return wrap(_mm256_srai_epi32(raw(v), bits)); }
inline I32 load_table(const u8* p) {
  return wrap(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)));
}
inline I32 look_up(I32 table, I32 v) { return wrap(_mm256_shuffle_epi8(raw(table), raw(v))); }
inline I32 zip_low(I32 a, I32 b) { return wrap(_mm256_unpacklo_epi8(raw(a), raw(b))); }
inline I32 zip_high(I32 a, I32 b) { return wrap(_mm256_unpackhi_epi8(raw(a), raw(b))); }
inline I32 load_i8(const u8* p) {
  return wrap(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)));
}
inline I32 dot(I32 sum, I32 a, I32 b) {
  return wrap(_mm256_add_epi32(raw(sum), _mm256_madd_epi16(raw(a), raw(b))));
}
inline F32 to_f32(I32 v) { return _mm256_cvtepi32_ps(raw(v)); }
inline I32 to_i32(F32 v) { return wrap(_mm256_cvtps_epi32(v)); }
inline F32 scale_by_power(F32 v, I32 n) {
  const __m256i exponent = _mm256_slli_epi32(raw(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent));
}
inline i32 sum_i32(I32 v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(raw(v)), _mm256_extracti128_si256(raw(v), 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline void store_i16(i16* p, I32 v) {
  const __m128i low = _mm256_castsi256_si128(raw(v)), high = _mm256_extracti128_si256(raw(v), 1);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(low, high));
}
inline I32 kept(I32 v) {
  asm("" : "+x"(v));
  return v;
}
inline F32 kept(F32 v) {
  asm("" : "+x"(v));
  return v;
}
inline void pause() { _mm_pause(); }

}  // namespace simd
