// The order of a row's tokens as one number, the smallest for the first: falling logit, then rising id. engine/sampler.py
// orders the same scaled logits (differences to the largest, divided by the temperature).
#pragma once
#include "ptx.cuh"

constexpr int id_bits = 19;
constexpr int depth_bits = 44;  // 5 before the point: scaled logits below -32 share the last depth
constexpr int digit_bits = 9;   // of a round of the search: buckets of 1/16 in the first, single tokens in the last
constexpr int num_buckets = 1 << digit_bits;
constexpr int first_shift = id_bits + depth_bits - digit_bits;
static_assert((id_bits + depth_bits) % digit_bits == 0, "the last round looks at single tokens");
constexpr u64 past_all = u64(1) << (id_bits + depth_bits);

// A token this far below the largest wins no draw (_HOPELESS of engine/sampler.py).
constexpr float hopeless = -26.03f;

__device__ __forceinline__ u64 order_of(float scaled, int id) {
  constexpr float unit = static_cast<float>(u64(1) << (depth_bits - 5));
  const float depth = fminf(-scaled, 31.999998f);
  return static_cast<u64>(depth * unit) << id_bits | static_cast<u32>(id);
}

// exp(scaled) in units of 2^-40: sums of integers are the same in any order, and 2^19 of them fit.
__device__ __forceinline__ u64 weight_of(float scaled) {
  return static_cast<u64>(expf(scaled) * static_cast<float>(u64(1) << 40));
}

// How far the search for the end of a head has come: the end lies in [low, low + (num_buckets << shift)).
struct Search {
  u64 low;
  u64 wanted;  // count or weight that the head must still reach behind `low`
  int shift;
  bool by_weight;
  bool active;
};

// What a round found: the bucket in which the head ends, and what lies before it.
struct Found {
  int bucket;
  u64 before;
  u64 own;    // count or weight of the bucket
  u64 count;  // its tokens
};

// One digit further. Returns the end of the head (orders below it are in) once it is known, else 0.
__device__ __forceinline__ u64 narrow(Search& search, const Found& found) {
  const u64 start = search.low + (u64(found.bucket) << search.shift);
  if (found.count == 1 || found.before + found.own == search.wanted || search.shift == 0) {
    search.active = false;
    return start + (u64(1) << search.shift);
  }
  search.low = start;
  search.wanted -= found.before;
  search.shift -= digit_bits;
  return 0;
}
