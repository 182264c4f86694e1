// QK-norm and rotary embedding of one head, in place.
#pragma once

#include <config.h>

#include <cmath>

#include "math.h"

// Cosines and sines of one position: [rotary_dim / 2] each, times the attention factor. The angle is
// rounded to float before its cosine is taken, as the models were trained.
inline void fill_rotation(const float* inv_freq, int half, int position, float factor, float* cosines,
                          float* sines) {
  for (int i = 0; i < half; ++i) {
    const float angle = float(position) * inv_freq[i];
    cosines[i] = std::cos(angle) * factor;
    sines[i] = std::sin(angle) * factor;
  }
}

// Rotates channels i and i + half of `head` for i < half.
inline void rotate(float* head, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * cosines[i] - second * sines[i];
    head[i + half] = second * cosines[i] + first * sines[i];
  }
}
