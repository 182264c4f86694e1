// Exponential, gated SiLU, RMSNorm: whole vectors, the same bits on every call.
#pragma once

#include <cmath>

#include "simd.h"

// e^v with an error of at most 2 units in the last place; 0 below -86.5, about 2.2e38 above 88.3.
// Cody and Waite's reduction to |r| <= ln(2) / 2, then Taylor's series to the 7th power (its
// remainder, 6e-9 relative, is below the rounding).
inline simd::F32 exponential(simd::F32 v) {
  using namespace simd;
  constexpr float smallest = -86.5f, largest = 88.3f;
  const F32 x = max(splat(smallest), min(splat(largest), v));
  const I32 n = to_i32(mul(x, splat(1.44269504f)));
  F32 r = fma(to_f32(n), splat(-0.693359375f), x);
  r = fma(to_f32(n), splat(2.12194440e-4f), r);
  F32 power = splat(1.0f / 5040);
  for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    power = fma(power, r, splat(coefficient));
  return zero_where_below(scale_by_power(power, n), v, smallest);
}

// gate * sigmoid(gate) * up
inline simd::F32 gated_silu(simd::F32 gate, simd::F32 up) {
  using namespace simd;
  const F32 denominator = add(splat(1.0f), exponential(sub(zero(), gate)));
  return mul(div(gate, denominator), up);
}

// 1 / root mean square of `x` [size], which zeros follow up to a multiple of 64.
inline float inverse_rms(const float* x, int size, float epsilon) {
  using namespace simd;
  F32 sums[4] = {zero(), zero(), zero(), zero()};
  for (int i = 0; i < size; i += 4 * lanes)
    for (int j = 0; j < 4; ++j) {
      const F32 v = load(x + i + j * lanes);
      sums[j] = fma(v, v, sums[j]);
    }
  const float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return 1.0f / std::sqrt(total / float(size) + epsilon);
}

// y = x / rms(x) * weight. x and weight [size] are followed by zeros up to a multiple of 64; so is y.
inline void rms_norm(const float* x, const float* weight, int size, float epsilon, float* y) {
  using namespace simd;
  const F32 scale = splat(inverse_rms(x, size, epsilon));
  for (int i = 0; i < size; i += lanes) store(y + i, mul(mul(load(x + i), scale), load(weight + i)));
}
