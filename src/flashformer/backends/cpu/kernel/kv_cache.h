// Keys and values of all tokens so far, as 16-bit floats, in pages of config::page_tokens positions.
//
// Memory: [layer][page][kv head]{ keys [head_dim][page_tokens], values [page_tokens][head_dim] }.
// Keys lie the other way round so that a vector holds one channel of neighbouring positions: the
// scores of several positions grow side by side, with no sum across a vector.
#pragma once

#include <config.h>

#include "simd.h"

using config::Layer;

struct KvCache {
  u16* pages;
  int num_pages;

  u16* keys(const Layer& layer, int page, int kv_head) const {
    const i64 head_elems = i64(2) * layer.head_dim * config::page_tokens;
    return pages + layer.kv_offset * num_pages + (i64(page) * layer.num_kv_heads + kv_head) * head_elems;
  }
  u16* values(const Layer& layer, int page, int kv_head) const {
    return keys(layer, page, kv_head) + i64(layer.head_dim) * config::page_tokens;
  }

  // key [head_dim], followed by room up to a whole vector
  void store_key(const Layer& layer, int page, int kv_head, int place, const float* key) const {
    alignas(64) u16 rounded[config::max_head_dim + simd::lanes];
    round_to_f16(key, layer.head_dim, rounded);
    u16* to = keys(layer, page, kv_head) + place;
    for (int d = 0; d < layer.head_dim; ++d) to[i64(d) * config::page_tokens] = rounded[d];
  }
  void store_value(const Layer& layer, int page, int kv_head, int place, const float* value) const {
    alignas(64) u16 rounded[config::max_head_dim + simd::lanes];
    round_to_f16(value, layer.head_dim, rounded);
    u16* to = values(layer, page, kv_head) + i64(place) * layer.head_dim;
    for (int d = 0; d < layer.head_dim; ++d) to[d] = rounded[d];
  }

 private:
  static void round_to_f16(const float* from, int count, u16* to) {
    for (int i = 0; i < count; i += simd::lanes) simd::store_f16(to + i, simd::load(from + i));
  }
};
