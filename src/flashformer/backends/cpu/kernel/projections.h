// Stages o_proj, gate_up, down and lm_head.
#pragma once

#include <limits>

#include "stages.h"

// hidden += matrix x activations (+ bias). Every row of `hidden` has one writer.
template <Format format>
void add_to_hidden(Cta& cta, Step& step, const Matrix& matrix, i64 bias_offset, const Activations& x) {
  const float* bias = bias_offset < 0 ? nullptr : step.vector(bias_offset);
  multiply_tiles<format>(cta, step, matrix, x, [&](int tile, int row, const float* sums) {
    float* out = step.space.hidden + row * hidden_stride + tile * tile_rows;
    const int count = std::min(tile_rows, matrix.rows - tile * tile_rows);
    for (int r = 0; r < count; ++r) out[r] += bias ? sums[r] + bias[tile * tile_rows + r] : sums[r];
  });
}

inline void o_proj(Cta& cta, Step& step, const Layer& layer) {
  const Activations x =
      take_rows<config::format>(cta, step, step.space.attended, q_stride, layer.num_q_heads * layer.head_dim);
  add_to_hidden<config::format>(cta, step, layer.o_proj, layer.o_bias, x);
}

inline void gate_up(Cta& cta, Step& step, const Layer& layer) {
  constexpr int half = tile_rows / 2;
  const Activations x =
      normalise<config::format>(cta, step, step.rows(), layer.post_attention_layernorm, [](int row) { return row; });
  const float* bias = layer.gate_up_bias < 0 ? nullptr : step.vector(layer.gate_up_bias);
  multiply_tiles<config::format>(cta, step, layer.gate_up, x, [&](int tile, int row, float* sums) {
    if (bias)
      for (int r = 0; r < tile_rows; ++r) sums[r] += bias[tile * tile_rows + r];
    alignas(64) float gate[std::max(half, simd::lanes)] = {}, up[std::max(half, simd::lanes)] = {};
    std::copy_n(sums, half, gate);
    std::copy_n(sums + half, half, up);
    for (int i = 0; i < half; i += simd::lanes)
      simd::store(gate + i, gated_silu(simd::load(gate + i), simd::load(up + i)));
    // Padding rows give zeros, which also pad the columns of the next matrix up to a tile.
    float* out = step.space.activated + row * activated_stride + tile * half;
    std::copy_n(gate, half, out);
    if (tile == layer.gate_up.num_tiles - 1)
      std::fill(out + half, step.space.activated + row * activated_stride + (layer.intermediate_size + 127) / 128 * 128,
                0.0f);
  });
}

inline void down(Cta& cta, Step& step, const Layer& layer) {
  const Activations x =
      take_rows<config::format>(cta, step, step.space.activated, activated_stride, layer.intermediate_size);
  add_to_hidden<config::format>(cta, step, layer.down, layer.down_bias, x);
}

// The best logit so far of one row, among the tiles of one CTA; id -1: there was a NaN.
inline void note_best(const float* logits, int first_id, int count, float& best, int& best_id) {
  for (int r = 0; r < count; ++r) {
    if (logits[r] != logits[r]) best_id = -1;
    if (best_id >= 0 && (logits[r] > best || (logits[r] == best && first_id + r < best_id))) {
      best = logits[r];
      best_id = first_id + r;
    }
  }
}

inline void lm_head(Cta& cta, Step& step) {
  const int rows = step.args.num_logit_rows;
  if (rows == 0) return;
  CtaSpace& space = step.space.of(cta);
  std::fill_n(space.best_logit, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(space.best_id, rows, config::vocab_size);
  const Activations x = normalise<config::head_format>(cta, step, rows, config::norm,
                                                       [&](int i) { return step.args.logit_rows[i]; });
  multiply_tiles<config::head_format>(cta, step, config::lm_head, x, [&](int tile, int i, const float* sums) {
    const int first_id = tile * tile_rows, count = std::min(tile_rows, config::vocab_size - first_id);
    std::copy_n(sums, count, step.args.logits + i64(i) * config::vocab_size + first_id);
    bool candidate = false;
    for (int r = 0; r < tile_rows; r += simd::lanes)
      candidate |= simd::any_at_least(simd::load(sums + r), space.best_logit[i]);
    if (candidate) note_best(sums, first_id, count, space.best_logit[i], space.best_id[i]);
  });
}

// The best of all CTAs: the largest logit, the lowest id among equals, -1 if there was a NaN.
inline void sample(const Step& step) {
  for (int i = 0; i < step.args.num_logit_rows; ++i) {
    float best = -std::numeric_limits<float>::infinity();
    int best_id = config::vocab_size;
    for (int cta = 0; cta < config::num_ctas; ++cta) {
      const int id = step.space.ctas[cta].best_id[i];
      const float logit = step.space.ctas[cta].best_logit[i];
      if (id < 0) best_id = -1;
      if (best_id >= 0 && (logit > best || (logit == best && id < best_id))) {
        best = logit;
        best_id = id;
      }
    }
    step.args.argmax[i] = best_id;
  }
}
