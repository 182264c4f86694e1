// The vector instructions of the machine, behind one set of names; everything else includes this.
//
// F32 holds `lanes` floats; I32 holds `lanes` 32-bit integers, or as many pairs of 16-bit integers
// (the even column in the low half). What needs saying:
//   max, min            a NaN in the second operand comes through
//   zero_where_below    v, but 0 where x < limit
//   any_at_least        some lane is >= limit or NaN
//   low_bf16, high_bf16 the half of each 32-bit lane as a float
//   load_i8             2 x lanes signed bytes as pairs of i16
//   load_table, look_up 16 bytes; the bytes of them that v's bytes (0 .. 15) count to
//   zip_low, zip_high   bytes of a and b in turns, from the lower or upper half of every 16 bytes
//   dot                 sum + a.low * b.low + a.high * b.high, exact
//   to_i32              nearest even
//   scale_by_power      v * 2^n, for normal results
//   kept                v, which passes through a register here: the compiler neither loads it again
//                       nor regroups the sum that it is part of
#pragma once

#if defined(FLASHFORMER_SCALAR)
#include "simd_scalar.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace simd {
inline constexpr int tile_vectors = tile_rows / lanes;  // vectors across the rows of a tile
}
