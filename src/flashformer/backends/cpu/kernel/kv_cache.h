// Keys and values of all tokens so far, as float32, in pages of config::page_tokens positions.
//
// Memory: [layer][page][kv head]{ keys [head_dim][page_tokens], values [page_tokens][head_dim] }.
// Keys lie the other way round so that a vector holds one channel of neighbouring positions: the
// scores of several positions grow side by side, with no sum across a vector.
#pragma once

#include <config.h>

#include <algorithm>

#include "simd.h"

using config::Layer;

struct KvCache {
  float* pages;
  int num_pages;

  float* keys(const Layer& layer, int page, int kv_head) const {
    const i64 head_elems = i64(2) * layer.head_dim * config::page_tokens;
    return pages + layer.kv_offset * num_pages + (i64(page) * layer.num_kv_heads + kv_head) * head_elems;
  }
  float* values(const Layer& layer, int page, int kv_head) const {
    return keys(layer, page, kv_head) + i64(layer.head_dim) * config::page_tokens;
  }

  // key, value: [head_dim]
  void store_key(const Layer& layer, int page, int kv_head, int place, const float* key) const {
    float* to = keys(layer, page, kv_head) + place;
    for (int d = 0; d < layer.head_dim; ++d) to[i64(d) * config::page_tokens] = key[d];
  }
  void store_value(const Layer& layer, int page, int kv_head, int place, const float* value) const {
    std::copy_n(value, layer.head_dim, values(layer, page, kv_head) + i64(place) * layer.head_dim);
  }
};
