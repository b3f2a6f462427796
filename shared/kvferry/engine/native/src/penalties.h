// What changes a row's logits before the draw: tokens that may not be drawn, biases, and penalties, in vLLM's order.

#pragma once

#include <cstdint>

#include "sample.h"

namespace kvferry {

inline bool penalised(const kvf_draw &draw) {
    return draw.presence_penalty != 0 || draw.frequency_penalty != 0 || draw.repetition_penalty != 1;
}

inline bool adjusts(const kvf_draw &draw) {
    return draw.allowed != nullptr || draw.num_banned > 0 || draw.num_biases > 0 || penalised(draw);
}

// Whether a mask allows any token of the vocabulary.
bool allows_any(const uint32_t *allowed, int32_t vocab_size);

// Changes `logits` [vocab_size] in place. `counts` [vocab_size] is scratch of any content.
void adjust(const kvf_draw &draw, float *logits, int32_t vocab_size, uint32_t *counts);

}  // namespace kvferry
