// The past: pages of keys and values, and how attention over them is cut into units that all CTAs share.
//
// A unit is (row, kv head, chunk of pages). The chunk size depends on the row's own length alone, so that a row's
// result does not depend on its neighbours. Pages hold keys and values in operand B's fragment order.
#pragma once
#include "packet.cuh"
#include "stages.cuh"

constexpr int dim_blocks = head_dim_padded / 16;
constexpr u32 page_bytes = config::page_tokens * head_dim_padded * 2;  // keys, or values, of one kv head
constexpr int page_blocks = config::page_tokens / 16;
constexpr int min_chunk_pages = ceil_div(256, config::page_tokens);  // shorter ones cost more to merge than they save
constexpr int warps_a_page = 4;
static_assert(page_blocks <= warps_a_page, "a warp takes one block of a page");
static_assert(config::group <= 16, "the query heads of a kv head are the 16 rows of one mma");
static_assert(config::head_dim % 8 == 0, "a head is a whole number of packets");
static_assert(page_bytes <= config::slot_bytes, "a page of keys of one head must fit a slot");

// Bytes of an element within a page of keys / of values.
__device__ __forceinline__ u32 key_offset(int token, int dim) {
  const int word = token % 16 / 8 * 2 + dim % 4 / 2;
  return (token / 16 * dim_blocks + dim / 16) * 512 + (token % 8 * 4 + dim % 16 / 4) * 16 + word * 4 + dim % 2 * 2;
}
__device__ __forceinline__ u32 value_offset(int token, int dim) {
  const int word = dim % 16 / 8 * 2 + token % 16 / 8;
  return (token / 16 * dim_blocks + dim / 16) * 512 + (dim % 8 * 4 + token % 8 / 2) * 16 + word * 4 + token % 2 * 2;
}

// What a row sees of its past. `base`: positions stored before this step.
struct RowPast {
  int first;  // first visible position
  int base;
  int first_page;
  int num_pages;
  int chunk_pages;
  int num_chunks;

  __device__ RowPast(int position, int base_, int window) : base(base_) {
    first = window > 0 ? max(0, position - window + 1) : 0;
    first_page = first / config::page_tokens;
    num_pages = base > first ? (base + config::page_tokens - 1) / config::page_tokens - first_page : 0;
    const int even = (num_pages * config::num_kv_heads + config::num_ctas - 1) / config::num_ctas;
    chunk_pages = max(min_chunk_pages, even);
    num_chunks = num_pages <= chunk_pages ? 1 : (num_pages + chunk_pages - 1) / chunk_pages;
  }
};

// Calls body(row, past, kv_head, chunk) for every unit of this CTA; producer and consumers walk the same list. Returns
// whether any row has several chunks.
template <class Body>
__device__ __forceinline__ bool for_each_unit(const Cta& cta, int step, int window, Body&& body) {
  int first_unit = 0;
  bool chunked = false;
  for (int row = 0; row < cta.args.num_rows; ++row) {
    const RowPast past(cta.args.positions[row] + step, cta.args.bases[row] + step, window);
    const int units = config::num_kv_heads * past.num_chunks;
    int unit = cta.idx - first_unit % config::num_ctas;
    if (unit < 0) unit += config::num_ctas;
    for (; unit < units; unit += config::num_ctas) {
      body(row, past, unit % config::num_kv_heads, unit / config::num_kv_heads);
    }
    first_unit += units;
    chunked |= past.num_chunks > 1;
  }
  return chunked;
}

__device__ __forceinline__ const u8* page_at(const Cta& cta, int layer, int page, int kv_head) {
  return cta.args.kv + ((u64(layer) * cta.args.num_pages + page) * config::num_kv_heads + kv_head) * (2 * page_bytes);
}

template <class Sink>
__device__ __forceinline__ void stream_past(Sink& ring, int layer, int step) {
  const Cta& cta = ring.cta;
  for_each_unit(cta, step, layer_table[layer].window, [&](int row, const RowPast& past, int kv_head, int chunk) {
    const int* table = cta.args.page_table + cta.args.slots[row] * cta.args.max_pages + past.first_page;
    const int begin = chunk * past.chunk_pages;
    const int end = min(past.num_pages, begin + past.chunk_pages);
    int entry = begin < end ? table[begin] : 0;
    for (int page = begin; page < end; ++page) {
      const u8* source = page_at(cta, layer, entry, kv_head);
      if (page + 1 < end) entry = table[page + 1];  // known by the time it is needed
      ring.fill(source, page_bytes);
      ring.fill(source + page_bytes, page_bytes);
    }
  });
}
