// Attention of the step's tokens over their sequences' pages.
//
// The positions of a sequence are cut into chunks of `chunk_tokens`, always at the same places. Within
// a chunk the softmax is plain (one maximum, one sum); chunks are folded together in order. So a
// token's result does not depend on what else is in the step, nor on who computes which chunk.
#pragma once

#include <algorithm>
#include <limits>

#include "kv_cache.h"
#include "math.h"

inline constexpr int chunk_tokens = 256;
inline constexpr int max_queries = 4;  // that share one pass over keys and values
inline constexpr int pages_per_chunk = chunk_tokens / config::page_tokens;
static_assert(chunk_tokens % config::page_tokens == 0, "a chunk is a whole number of pages");
static_assert(config::page_tokens % (2 * simd::lanes) == 0, "a page is a whole number of vector pairs");

inline constexpr int head_stride = (config::max_head_dim + 63) / 64 * 64;

// Softmax over some positions, not yet normalised: output = sums / weight.
struct Partial {
  float largest;  // score
  float weight;  // sum of exp(score - largest)
  float sums[head_stride];  // of exp(score - largest) * value
};

// One query head of one token.
struct Query {
  const float* q;  // [head_dim], times the attention scale
  int first, end;  // positions it sees within the chunk

  bool sees_any() const { return first < end; }
};

struct AttentionScratch {
  alignas(64) float q[max_queries][head_stride];
  alignas(64) float scores[max_queries][chunk_tokens];
};

// later := earlier and later together, for the same query. Order matters for the last bit.
inline void fold(const Partial& earlier, Partial& later, int head_dim) {
  using namespace simd;
  const float largest = std::max(earlier.largest, later.largest);
  alignas(64) float factors[lanes] = {earlier.largest - largest, later.largest - largest};
  store(factors, exponential(load(factors)));
  const F32 of_earlier = splat(factors[0]), of_later = splat(factors[1]);
  later.largest = largest;
  later.weight = earlier.weight * factors[0] + later.weight * factors[1];
  for (int d = 0; d < head_dim; d += lanes)
    store(later.sums + d, fma(load(earlier.sums + d), of_earlier, mul(load(later.sums + d), of_later)));
}

// scores[query][place] = q . key, for the vectors of positions first .. end of one page.
template <int queries>
inline void score_page(const float* keys, const Query* query, int head_dim, int first, int end, int page_start,
                       AttentionScratch& scratch) {
  using namespace simd;
  constexpr int step = 2 * lanes;
  for (int place = first / step * step; place < end; place += step) {
    F32 acc[queries][2];
#pragma GCC unroll 8
    for (int i = 0; i < queries; ++i) acc[i][0] = acc[i][1] = zero();
    const float* column = keys + place;
    for (int d = 0; d < head_dim; ++d, column += config::page_tokens) {
      const F32 low = kept(load(column)), high = kept(load(column + lanes));
#pragma GCC unroll 8
      for (int i = 0; i < queries; ++i) {
        const F32 value = splat(query[i].q[d]);
        acc[i][0] = fma(low, value, acc[i][0]);
        acc[i][1] = fma(high, value, acc[i][1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < queries; ++i) {
      store(scratch.scores[i] + page_start + place, acc[i][0]);
      store(scratch.scores[i] + page_start + place + lanes, acc[i][1]);
    }
  }
}

// sums[query] += weight * value over positions first .. end of one page.
template <int queries>
inline void add_values(const float* values, int head_dim, int first, int end, int page_start,
                       const AttentionScratch& scratch, Partial* partials) {
  using namespace simd;
  constexpr int step = 2 * lanes;
  for (int d = 0; d < head_dim; d += step) {
    const bool wide = d + lanes < head_dim;  // else the second vector would be the next row's
    F32 acc[queries][2];
#pragma GCC unroll 8
    for (int i = 0; i < queries; ++i) {
      acc[i][0] = load(partials[i].sums + d);
      acc[i][1] = load(partials[i].sums + d + (wide ? lanes : 0));
    }
    for (int place = first; place < end; ++place) {
      const float* row = values + i64(place) * head_dim + d;
      const F32 low = kept(load(row)), high = kept(load(row + (wide ? lanes : 0)));
#pragma GCC unroll 8
      for (int i = 0; i < queries; ++i) {
        const F32 weight = splat(scratch.scores[i][page_start + place]);
        acc[i][0] = fma(low, weight, acc[i][0]);
        acc[i][1] = fma(high, weight, acc[i][1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < queries; ++i) {
      store(partials[i].sums + d, acc[i][0]);
      if (wide) store(partials[i].sums + d + lanes, acc[i][1]);
    }
  }
}

// Scores -> weights in place; positions that the query does not see get weight 0.
inline void soften(float* scores, const Query& query, int first, int end, Partial& partial) {
  using namespace simd;
  constexpr float unseen = -std::numeric_limits<float>::infinity();
  std::fill_n(partial.sums, head_stride, 0.0f);
  if (!query.sees_any()) {
    std::fill(scores + first, scores + end, 0.0f);
    return;
  }
  std::fill(scores + first, scores + query.first, unseen);
  std::fill(scores + query.end, scores + end, unseen);
  F32 most = splat(unseen);
  for (int i = first; i < end; i += lanes) most = max(most, load(scores + i));
  partial.largest = largest(most);
  F32 total = zero();
  for (int i = first; i < end; i += lanes) {
    const F32 weight = exponential(sub(load(scores + i), splat(partial.largest)));
    store(scores + i, weight);
    total = add(total, weight);
  }
  partial.weight = sum(total);
}

// Where the pages of one sequence are: page_of(i) holds positions i * page_tokens ..
struct Past {
  const KvCache& cache;
  const Layer& layer;
  const int* pages;
  int kv_head;
};

// Up to max_queries queries against one chunk. All positions between the first and the last that any
// of them sees belong to the sequence, so a weight of 0 meets no stranger's value.
template <int queries>
inline void attend_chunk(const Past& past, int chunk, const Query* query, AttentionScratch& scratch,
                         Partial* partials) {
  const int head_dim = past.layer.head_dim;
  int first = chunk_tokens, end = 0;
  for (int i = 0; i < queries; ++i)
    if (query[i].sees_any()) {
      first = std::min(first, query[i].first);
      end = std::max(end, query[i].end);
    }
  constexpr int step = 2 * simd::lanes;
  const int wide_first = first / step * step, wide_end = (end + step - 1) / step * step;
  const int first_page = first / config::page_tokens;
  const int end_page = (end + config::page_tokens - 1) / config::page_tokens;
  const auto for_pages = [&](auto&& use) {
    for (int p = first_page; p < end_page; ++p) {
      const int start = p * config::page_tokens, page = past.pages[chunk * pages_per_chunk + p];
      use(page, start, std::max(first - start, 0), std::min(end - start, config::page_tokens));
    }
  };
  for_pages([&](int page, int start, int low, int high) {
    score_page<queries>(past.cache.keys(past.layer, page, past.kv_head), query, head_dim, low, high, start, scratch);
  });
  for (int i = 0; i < queries; ++i) soften(scratch.scores[i], query[i], wide_first, wide_end, partials[i]);
  for_pages([&](int page, int start, int low, int high) {
    add_values<queries>(past.cache.values(past.layer, page, past.kv_head), head_dim, low, high, start, scratch, partials);
  });
}

inline void attend_chunk(int queries, const Past& past, int chunk, const Query* query,
                         AttentionScratch& scratch, Partial* partials) {
  switch (queries) {
    case 1: return attend_chunk<1>(past, chunk, query, scratch, partials);
    case 2: return attend_chunk<2>(past, chunk, query, scratch, partials);
    case 3: return attend_chunk<3>(past, chunk, query, scratch, partials);
    default: return attend_chunk<4>(past, chunk, query, scratch, partials);
  }
}

// output [head_dim] = sums / weight
inline void finish(const Partial& partial, int head_dim, float* output) {
  using namespace simd;
  const float inverse = 1.0f / partial.weight;
  int d = 0;
  for (; d + lanes <= head_dim; d += lanes) store(output + d, mul(load(partial.sums + d), splat(inverse)));
  for (; d < head_dim; ++d) output[d] = partial.sums[d] * inverse;
}
