// Stage qkv: RMSNorm, projection, then QK-norm, RoPE and the append to the cache while the heads are
// still in the first-level cache.
#pragma once

#include <numeric>

#include "rope.h"
#include "stages.h"

// Tiles that hold whole heads: the unit in which the projection is shared out.
constexpr int head_tiles(const Layer& layer) { return std::lcm(layer.head_dim, tile_rows) / tile_rows; }

constexpr int most_head_tiles() {
  int most = max_tiles;
  for (const Layer& layer : config::layers) most = std::max(most, head_tiles(layer));
  return most;
}

// One head of one row: `head` [head_stride] holds the projection with its bias.
inline void place_head(const Step& step, const Layer& layer, int row, int head_idx, float* head) {
  const int kv_idx = head_idx - layer.num_q_heads, value_idx = kv_idx - layer.num_kv_heads;
  const bool is_query = kv_idx < 0;
  if (value_idx < 0) {
    if (layer.qk_norm)
      rms_norm(head, step.vector(is_query ? layer.q_norm : layer.k_norm), layer.head_dim, config::rms_norm_eps, head);
    if (layer.rope_idx >= 0) {
      const float* cosines = step.rotation(layer.rope_idx, row);
      rotate(head, cosines, cosines + rotation_stride / 2, config::ropes[layer.rope_idx].rotary_dim / 2);
    }
  }
  if (is_query) {
    float* out = step.space.q + row * q_stride + i64(head_idx) * layer.head_dim;
    for (int d = 0; d < layer.head_dim; ++d) out[d] = head[d] * layer.attention_scale;
    return;
  }
  const int position = step.args.positions[row], place = position % config::page_tokens;
  const int page = step.pages(row)[position / config::page_tokens];
  if (value_idx < 0)
    step.cache().store_key(layer, page, kv_idx, place, head);
  else
    step.cache().store_value(layer, page, value_idx, place, head);
}

inline void qkv(Cta& cta, Step& step, const Layer& layer) {
  const Matrix& matrix = layer.qkv;
  const int unit = head_tiles(layer), unit_heads = unit * tile_rows / layer.head_dim;
  const int num_heads = layer.num_q_heads + 2 * layer.num_kv_heads;
  const Activations x =
      normalise<config::format>(cta, step, step.rows(), layer.input_layernorm, [](int row) { return row; });
  const float* bias = layer.qkv_bias < 0 ? nullptr : step.vector(layer.qkv_bias);
  float* head = step.space.of(cta).head;
  std::fill_n(head, head_stride, 0.0f);
  const auto first_unit = [&](int owner) { return (first_tile(matrix, owner) + unit - 1) / unit; };
  multiply_pieces<config::format>(cta, step, matrix, x, first_unit, unit, 1, [&](int tile, int, Sums sums) {
    const int first_head = tile / unit * unit_heads;
    for (int row = 0; row < x.tokens; ++row)
      for (int i = 0; i < unit_heads && first_head + i < num_heads; ++i) {
        for (int d = 0; d < layer.head_dim; ++d) {
          const int r = i * layer.head_dim + d;
          head[d] = sums.of(r / tile_rows, row)[r % tile_rows] + (bias ? bias[tile * tile_rows + r] : 0.0f);
        }
        place_head(step, layer, row, first_head + i, head);
      }
  });
}
