// Random numbers by counter, and the noise of the race that draws a token: engine/philox.py and engine/sampler.py.
#pragma once
#include "ptx.cuh"

// Philox4x32-10 (Salmon et al., SC 2011): four words for a counter of four words and a key of 64 bits.
__device__ __forceinline__ Vec16 philox4x32(Vec16 counter, u64 key) {
  u32 k0 = static_cast<u32>(key);
  u32 k1 = static_cast<u32>(key >> 32);
  auto& c = counter.w;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 product0 = u64(c[0]) * 0xD2511F53u;
    const u64 product1 = u64(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<u32>(product1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<u32>(product1);
    c[2] = static_cast<u32>(product0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<u32>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// -log(-log(1 - u)) for u = (word + 1/2) / 2^32, to a few units in the last place: near u = 1, 1 - u is what is exact.
__device__ __forceinline__ float gumbel(u32 word) {
  constexpr float scale = 1.f / 4294967296.f;
  const float exponential = word >> 31 ? -logf((static_cast<float>(~word) + 0.5f) * scale)
                                       : -log1pf((static_cast<float>(word) + 0.5f) * -scale);
  return -logf(exponential);
}
