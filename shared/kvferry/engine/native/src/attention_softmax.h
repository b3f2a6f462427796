// The online softmax of one row, step by step.
#pragma once

#include <algorithm>

#include "attention_step.h"
#include "exp2.h"

namespace kvferry {

// Below every score: finite, so that the difference of two is never NaN.
constexpr float kLowest = -1e30f;

// One row's step of the online softmax, first half: scores that it doesn't see are hidden, its maximum is raised, and
// what it has so far is scaled to the new maximum.
inline void raise_maximum(float* scores, Span span, float factor, float* maximum, float* total, float* outputs,
                   int padded_dim) {
  if (!span.whole()) {
    std::fill(scores, scores + span.begin, kLowest);
    std::fill(scores + span.end, scores + kStepPositions, kLowest);
  }
  Isa::F top = Isa::load(scores);
  for (int v = 1; v < kStepVectors; ++v) top = Isa::max(top, Isa::load(scores + v * Isa::kLanes));
  const float highest = Isa::hmax(top) * factor;
  if (!(highest > *maximum)) return;
  const Isa::F shrink = exp2(Isa::set1(*maximum - highest));
  for (int d = 0; d < padded_dim; d += Isa::kLanes) {
    Isa::store(outputs + d, Isa::mul(Isa::load(outputs + d), shrink));
  }
  Isa::store(total, Isa::mul(Isa::load(total), shrink));
  *maximum = highest;
}

// Second half: scores to probabilities. Apart from the first, so that the processor finds independent work in the rows.
inline void soften(const float* scores, bf16* probabilities, float factor, float maximum, float* total) {
  const Isa::F power = Isa::set1(factor), offset = Isa::set1(-maximum);
  Isa::F sum = Isa::load(total);
  for (int v = 0; v < kStepVectors; ++v) {
    const Isa::F p = exp2(Isa::fma(Isa::load(scores + v * Isa::kLanes), power, offset));
    sum = Isa::add(sum, p);
    Isa::store_bf16(probabilities + v * Isa::kLanes, p);
  }
  Isa::store(total, sum);
}

}  // namespace kvferry
