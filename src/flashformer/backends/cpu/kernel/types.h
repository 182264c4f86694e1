// Short names of the fixed-width types, and the two 16-bit floats as bit patterns.
#pragma once

#include <bit>
#include <cstdint>

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline constexpr int tile_rows = 16;
inline constexpr float f16_max = 65504.0f;

inline float from_bf16(u16 bits) { return std::bit_cast<float>(u32(bits) << 16); }

inline float from_f16(u16 bits) {
  const u32 sign = u32(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | magnitude << 13);
  // The exponents differ by 112; the product also makes subnormals right.
  return std::bit_cast<float>(sign | std::bit_cast<u32>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

// Nearest even; beyond the largest number: the largest number.
inline u16 to_f16(float value) {
  const u32 bits = std::bit_cast<u32>(value), sign = bits >> 16 & 0x8000;
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffff);
  if (magnitude != magnitude) return u16(sign | 0x7e00);
  if (magnitude >= f16_max) return u16(sign | 0x7bff);
  if (magnitude < 0x1p-14f)  // subnormal: steps of 2^-24, the last place of 0.5
    return u16(sign | (std::bit_cast<u32>(magnitude + 0.5f) - std::bit_cast<u32>(0.5f)));
  const u32 rounded = std::bit_cast<u32>(magnitude) + 0xfff + (bits >> 13 & 1);
  return u16(sign | ((rounded >> 13) - (112 << 10)));
}
