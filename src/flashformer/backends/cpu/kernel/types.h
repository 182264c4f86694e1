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

inline float from_bf16(u16 bits) { return std::bit_cast<float>(u32(bits) << 16); }

inline float from_f16(u16 bits) {
  const u32 sign = u32(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | magnitude << 13);
  // The exponents differ by 112; the product also makes subnormals right.
  return std::bit_cast<float>(sign | std::bit_cast<u32>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}
