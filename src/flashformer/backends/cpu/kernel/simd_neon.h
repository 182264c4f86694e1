// Vectors of 4: AArch64 Advanced SIMD. See simd.h.
#pragma once

#include <arm_neon.h>

#include "types.h"

namespace simd {

inline constexpr int lanes = 4;
inline constexpr int accumulators = 24;
using F32 = float32x4_t;
using I32 = int32x4_t;

inline F32 zero() { return vdupq_n_f32(0.0f); }
inline F32 splat(float v) { return vdupq_n_f32(v); }
inline F32 load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F32 v) { vst1q_f32(p, v); }
inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
inline F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
inline F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
inline F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
inline F32 min(F32 a, F32 b) { return vminq_f32(a, b); }
inline F32 abs(F32 a) { return vabsq_f32(a); }
inline F32 zero_where_below(F32 v, F32 x, float limit) {
  const uint32x4_t below = vcltq_f32(x, vdupq_n_f32(limit));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), below));
}
inline bool any_at_least(F32 v, float limit) {
  return vminvq_u32(vcltq_f32(v, vdupq_n_f32(limit))) == 0;
}
inline float sum(F32 v) { return vaddvq_f32(v); }
inline float largest(F32 v) { return vmaxvq_f32(v); }

inline F32 load_f16(const u16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F32 low_bf16(I32 v) { return vreinterpretq_f32_s32(vshlq_n_s32(v, 16)); }
inline F32 high_bf16(I32 v) { return vreinterpretq_f32_s32(vandq_s32(v, vdupq_n_s32(-65536))); }

inline I32 zero_i32() { return vdupq_n_s32(0); }
inline I32 splat_i32(i32 v) { return vdupq_n_s32(v); }
inline I32 load_i32(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const u8*)p)); }
inline void store_i32(void* p, I32 v) { vst1q_u8((u8*)p, vreinterpretq_u8_s32(v)); }
inline I32 add_i32(I32 a, I32 b) { return vaddq_s32(a, b); }
inline I32 bit_and(I32 a, I32 b) { return vandq_s32(a, b); }
template <int bits>
inline I32 shift_right_i16(I32 v) {
  if constexpr (bits == 0) return v;
  else return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(v), bits));
}
template <int bits>
inline I32 shift_right_i32(I32 v) { return vshrq_n_s32(v, bits); }
inline I32 load_table(const u8* p) { return load_i32(p); }
inline I32 look_up(I32 table, I32 v) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(v)));
}
inline I32 zip_low(I32 a, I32 b) {
  return vreinterpretq_s32_u8(vzip1q_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
}
inline I32 zip_high(I32 a, I32 b) {
  return vreinterpretq_s32_u8(vzip2q_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
}
inline I32 load_i8(const u8* p) {
  return vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))));
}
inline I32 dot(I32 sum, I32 a, I32 b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
  return vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(x, y)));
}
inline F32 to_f32(I32 v) { return vcvtq_f32_s32(v); }
inline I32 to_i32(F32 v) { return vcvtnq_s32_f32(v); }
inline F32 scale_by_power(F32 v, I32 n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(n, 23)));
}
inline i32 sum_i32(I32 v) { return vaddvq_s32(v); }
inline void store_i16(i16* p, I32 v) { vst1_s16(p, vqmovn_s32(v)); }
inline I32 kept(I32 v) {
  asm("" : "+w"(v));
  return v;
}
inline F32 kept(F32 v) {
  asm("" : "+w"(v));
  return v;
}
inline void pause() { asm volatile("yield"); }

}  // namespace simd
