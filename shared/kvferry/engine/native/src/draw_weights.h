// Weights of a row's tokens in fixed point: 2^30 for the largest logit.

#pragma once

#include <cstdint>

namespace kvferry {

constexpr int32_t kWeightOne = 1 << 30;

// The largest value that is not NaN; -inf if there is none.
float largest(const float *logits, int32_t count);

// Replace NaN by -inf and +inf by a large finite value, so that a broken row stays drawable.
void repair(const float *from, float *to, int32_t count);

// weights[i] = trunc(2^30 * 2^((logits[i] - best) * scale)); those below `floor` become 0. `best` is finite; a NaN
// logit weighs 0.
void weigh(const float *logits, int32_t count, float best, float scale, int32_t floor, int32_t *weights);

// The index of the largest value, the lowest of equal ones; NaN is below everything.
int32_t argmax(const float *logits, int32_t count);

}  // namespace kvferry
