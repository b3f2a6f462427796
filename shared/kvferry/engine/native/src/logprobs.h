// Log-probabilities and ranks of raw logits.

#pragma once

#include <cstdint>

#include "sample.h"

namespace kvferry {

// `weights` [vocab_size] is scratch.
void find_logprobs(const float *logits, int32_t vocab_size, uint32_t token, int32_t num_top,
                   int32_t *weights, kvf_logprobs *out);

}  // namespace kvferry
