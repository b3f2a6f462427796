// Draws and scores of some rows of a batch: what threads share a batch by.
#pragma once

#include "sample.h"

namespace kvferry {

// KVF_OK, or why the batch can't be drawn.
int32_t check_draws(const float *logits, int32_t num_draws, int32_t vocab_size, const kvf_draw *draws,
                    const uint32_t *tokens);

// Rows [begin, end) of a checked batch. `scratch`: of this thread alone, as kvf_sample wants it.
void draw_rows(const float *logits, int32_t begin, int32_t end, int32_t vocab_size, const kvf_draw *draws,
               void *scratch, uint32_t *tokens);

// KVF_OK, or why the rows can't be scored.
int32_t check_scores(const float *logits, int32_t num_rows, int32_t vocab_size, const uint32_t *targets,
                     int32_t num_top, const kvf_logprobs *logprobs);

// Rows [begin, end) of checked ones.
void score_rows(const float *logits, int32_t begin, int32_t end, int32_t vocab_size, const uint32_t *targets,
                int32_t num_top, void *scratch, kvf_logprobs *logprobs);

}  // namespace kvferry
