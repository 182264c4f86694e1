// Vectors of 4 as plain loops, for machines without a path of their own. See simd.h.
#pragma once

#include <cmath>
#include <cstring>

#include "types.h"

namespace simd {

inline constexpr int lanes = 4;
inline constexpr int accumulators = 8;
struct F32 {
  float at[lanes];
};
struct I32 {
  i32 at[lanes];  // or pairs of i16: even column in the low half
};

template <class Vector, class Function>
inline Vector each(Function function) {
  Vector result;
  for (int i = 0; i < lanes; ++i) result.at[i] = function(i);
  return result;
}

inline F32 splat(float v) { return each<F32>([=](int) { return v; }); }
inline F32 zero() { return splat(0.0f); }
inline F32 load(const float* p) { return each<F32>([=](int i) { return p[i]; }); }
inline void store(float* p, F32 v) { std::memcpy(p, v.at, sizeof v); }
inline F32 add(F32 a, F32 b) { return each<F32>([&](int i) { return a.at[i] + b.at[i]; }); }
inline F32 sub(F32 a, F32 b) { return each<F32>([&](int i) { return a.at[i] - b.at[i]; }); }
inline F32 mul(F32 a, F32 b) { return each<F32>([&](int i) { return a.at[i] * b.at[i]; }); }
inline F32 div(F32 a, F32 b) { return each<F32>([&](int i) { return a.at[i] / b.at[i]; }); }
inline F32 fma(F32 a, F32 b, F32 c) {
  return each<F32>([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
inline F32 max(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline F32 min(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
inline F32 abs(F32 a) { return each<F32>([&](int i) { return std::fabs(a.at[i]); }); }
inline F32 zero_where_below(F32 v, F32 x, float limit) {
  return each<F32>([&](int i) { return x.at[i] < limit ? 0.0f : v.at[i]; });
}
inline bool any_at_least(F32 v, float limit) {
  bool found = false;
  for (float value : v.at) found |= !(value < limit);
  return found;
}
inline float sum(F32 v) { return (v.at[0] + v.at[2]) + (v.at[1] + v.at[3]); }
inline float largest(F32 v) { 
  float best = v.at[0];
  for (float value : v.at) best = value > best ? value : best;
  return best;
}

inline F32 load_f16(const u16* p) { return each<F32>([=](int i) { return from_f16(p[i]); }); }
inline F32 low_bf16(I32 v) { return each<F32>([&](int i) { return from_bf16(u16(v.at[i])); }); }
inline F32 high_bf16(I32 v) {
  return each<F32>([&](int i) { return from_bf16(u16(u32(v.at[i]) >> 16)); });
}

inline I32 splat_i32(i32 v) { return each<I32>([=](int) { return v; }); }
inline I32 zero_i32() { return splat_i32(0); }
inline I32 load_i32(const void* p) {
  I32 v;
  std::memcpy(v.at, p, sizeof v);
  return v;
}
inline void store_i32(void* p, I32 v) { std::memcpy(p, v.at, sizeof v); }
inline I32 add_i32(I32 a, I32 b) { return each<I32>([&](int i) { return a.at[i] + b.at[i]; }); }
inline I32 bit_and(I32 a, I32 b) { return each<I32>([&](int i) { return a.at[i] & b.at[i]; }); }
inline i32 low_half(i32 v) { return i16(v); }
inline i32 high_half(i32 v) { return i16(u32(v) >> 16); }
inline i32 join(i32 low, i32 high) { return i32(u32(u16(low)) | u32(u16(high)) << 16); }
template <int bits>
inline I32 shift_right_i16(I32 v) {
  return each<I32>([&](int i) {
    return join(u16(low_half(v.at[i])) >> bits, u16(high_half(v.at[i])) >> bits);
  });
}
template <int bits>
inline I32 shift_right_i32(I32 v) { return each<I32>([&](int i) { return v.at[i] >> bits; }); }
inline I32 load_table(const u8* p) { return load_i32(p); }
template <class Function>
inline I32 each_byte(Function function) {
  u8 bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = function(i);
  return load_i32(bytes);
}
inline u8 byte_of(I32 v, int i) { return u8(u32(v.at[i / 4]) >> 8 * (i % 4)); }
inline I32 look_up(I32 table, I32 v) {
  return each_byte([&](int i) { return byte_of(table, byte_of(v, i)); });
}
inline I32 zip_low(I32 a, I32 b) {
  return each_byte([&](int i) { return byte_of(i % 2 ? b : a, i / 2); });
}
inline I32 zip_high(I32 a, I32 b) {
  return each_byte([&](int i) { return byte_of(i % 2 ? b : a, 8 + i / 2); });
}
inline I32 load_i8(const u8* p) {
  return each<I32>([=](int i) { return join(i8(p[2 * i]), i8(p[2 * i + 1])); });
}
inline I32 dot(I32 sum, I32 a, I32 b) {
  return each<I32>([&](int i) {
    return sum.at[i] + low_half(a.at[i]) * low_half(b.at[i]) +
           high_half(a.at[i]) * high_half(b.at[i]);
  });
}
inline F32 to_f32(I32 v) { return each<F32>([&](int i) { return float(v.at[i]); }); }
inline I32 to_i32(F32 v) { return each<I32>([&](int i) { return i32(std::nearbyint(v.at[i])); }); }
inline F32 scale_by_power(F32 v, I32 n) {
  return each<F32>([&](int i) {
    return std::bit_cast<float>(std::bit_cast<u32>(v.at[i]) + (u32(n.at[i]) << 23));
  });
}
inline i32 sum_i32(I32 v) { return v.at[0] + v.at[1] + v.at[2] + v.at[3]; }
inline void store_i16(i16* p, I32 v) {
  for (int i = 0; i < lanes; ++i) p[i] = i16(v.at[i]);
}
inline I32 kept(I32 v) { return v; }
inline F32 kept(F32 v) { return v; }
inline void pause() {}

}  // namespace simd
