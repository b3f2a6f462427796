// Probabilities times values of one step, added to what a tile's rows have so far.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention_scratch.h"
#include "attention_step.h"

namespace kvferry {

// outputs[r][V vectors] += probabilities x values over pairs of positions [begin, end). `next`: the pages of the next
// step; `line`: the length of a pair of positions; `offset`: the first dimension.
template <int R, int V>
void weigh(const bf16* const* values, const bf16* const* next, int begin, int end, int line, const bf16* probabilities,
           float* outputs, int padded_dim, int offset) {
  constexpr int kPagePairs = kPageTokens / 2;
  Isa::F sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = Isa::load(outputs + r * padded_dim + offset + v * Isa::kLanes);
  }
  for (int pair = begin; pair < end;) {
    const int place = pair % kPagePairs * line + offset * 2;
    const bf16* from = values[pair / kPagePairs] + place;
    const bf16* ahead = next[pair / kPagePairs] + place;
    const int stop = std::min(end, (pair / kPagePairs + 1) * kPagePairs);
    for (; pair < stop; ++pair, from += line, ahead += line) {
      Isa::P x[V];
      for (int v = 0; v < V; ++v) {
        x[v] = Isa::load_pairs(from + v * 2 * Isa::kLanes);
        fetch_ahead(ahead + v * 2 * Isa::kLanes);
      }
      for (int r = 0; r < R; ++r) {
        const Isa::P p = Isa::broadcast_pair(probabilities + r * kStepPositions + pair * 2);
        for (int v = 0; v < V; ++v) sums[r][v] = Isa::dot2(sums[r][v], x[v], p);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Isa::store(outputs + r * padded_dim + offset + v * Isa::kLanes, sums[r][v]);
  }
}

// All vectors that hold one of head_dim dimensions.
template <int R>
void weigh_pairs(const bf16* const* values, const bf16* const* next, int begin, int end, const bf16* probabilities,
                 float* outputs, int head_dim, int padded_dim) {
  constexpr int V = vectors_for(R);
  if (begin >= end) return;
  const int line = 2 * padded_dim;
  int offset = 0;
  for (; offset + V * Isa::kLanes <= padded_dim; offset += V * Isa::kLanes) {
    weigh<R, V>(values, next, begin, end, line, probabilities, outputs, padded_dim, offset);
  }
  for (; offset < head_dim; offset += Isa::kLanes) {
    weigh<R, 1>(values, next, begin, end, line, probabilities, outputs, padded_dim, offset);
  }
}

// One row over any span of positions. At an odd edge the pair's other position is made zero, in a copy.
inline void weigh_row(const StepPages& step, Span span, const bf16* probabilities, float* outputs, int head_dim,
               int padded_dim, bf16* patched) {
  const auto edge = [&](int position) {
    const int pair = position / 2, place = pair % (kPageTokens / 2) * 2 * padded_dim;
    const bf16* from = step.values[position / kPageTokens] + place;
    for (int d = 0; d < padded_dim; d += Isa::kLanes) {
      const Isa::P both = Isa::load_pairs(from + 2 * d);
      if (position % 2 == 0) {
        Isa::store_pairs(patched + place + 2 * d, Isa::keep_low(both));
      } else {
        const Isa::F odd = Isa::high(both);  // the even position's bits are zero
        std::memcpy(patched + place + 2 * d, &odd, sizeof odd);
      }
    }
    const bf16* pages[kStepPages];
    pages[position / kPageTokens] = patched;
    weigh_pairs<1>(pages, pages, pair, pair + 1, probabilities, outputs, head_dim, padded_dim);
  };
  if (span.empty()) return;
  if (span.begin % 2 != 0) edge(span.begin++);
  weigh_pairs<1>(step.values, step.values, span.begin / 2, span.end / 2, probabilities, outputs, head_dim, padded_dim);
  if (span.end % 2 != 0 && span.begin < span.end) edge(span.end - 1);
}

// The step's values into all rows. What all of them see is done together, the rest row by row; each row meets its own
// positions in rising order either way.
template <int R>
void weigh_step(const StepPages& step, const StepPages& next, const Span (&spans)[R], const AttentionScratch& scratch,
                int head_dim, int padded_dim) {
  Span common{0, kStepPositions};
  for (const Span& span : spans) {
    common.begin = std::max(common.begin, span.begin);
    common.end = std::min(common.end, span.end);
  }
  common.begin = (common.begin + 1) / 2 * 2;
  common.end = common.end / 2 * 2;
  const auto row = [&](int r, Span span) {
    weigh_row(step, span, scratch.probabilities + r * kStepPositions, scratch.outputs + r * padded_dim, head_dim,
              padded_dim, scratch.patched);
  };
  if (common.empty()) {
    for (int r = 0; r < R; ++r) row(r, spans[r]);
    return;
  }
  for (int r = 0; r < R; ++r) row(r, {spans[r].begin, common.begin});
  weigh_pairs<R>(step.values, next.values, common.begin / 2, common.end / 2, scratch.probabilities, scratch.outputs,
                 head_dim, padded_dim);
  for (int r = 0; r < R; ++r) row(r, {common.end, spans[r].end});
}

}  // namespace kvferry
