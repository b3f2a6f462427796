// Scores of a tile's rows in one step: queries times keys.
#pragma once

#include <algorithm>

#include "attention_step.h"

namespace kvferry {

// scores[r][v * W ...] of V vectors; `keys[v]` is the first pair of vector v, `next[v]` the same in the next step.
template <int R, int V>
void score(const bf16* const* keys, const bf16* const* next, const bf16* queries, int pairs, float* scores) {
  Isa::F sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = Isa::zero();
  }
  for (int pair = 0; pair < pairs; ++pair) {
    Isa::P k[V];
    for (int v = 0; v < V; ++v) {
      k[v] = Isa::load_pairs(keys[v] + pair * 2 * kPageTokens);
      fetch_ahead(next[v] + pair * 2 * kPageTokens);
    }
    for (int r = 0; r < R; ++r) {
      const Isa::P q = Isa::broadcast_pair(queries + (pair * R + r) * 2);
      for (int v = 0; v < V; ++v) sums[r][v] = Isa::dot2(sums[r][v], k[v], q);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Isa::store(scores + r * kStepPositions + v * Isa::kLanes, sums[r][v]);
  }
}

// Scores of the step's first `pages` pages, at least one. Where vectors come in blocks that end beyond, the last page
// is read again in place of those that don't exist; nobody sees these scores.
template <int R>
void score_step(const StepPages& step, const StepPages& next_step, int pages, const bf16* queries, int pairs,
                float* scores) {
  constexpr int V = vectors_for(R);
  for (int vector = 0; vector * Isa::kLanes < pages * kPageTokens; vector += V) {
    const bf16* keys[V];
    const bf16* next[V];
    for (int v = 0; v < V; ++v) {
      const int lane = (vector + v) * Isa::kLanes, page = std::min(lane / kPageTokens, pages - 1);
      keys[v] = step.keys[page] + lane % kPageTokens * 2;
      next[v] = next_step.keys[page] + lane % kPageTokens * 2;
    }
    score<R, V>(keys, next, queries, pairs, scores + vector * Isa::kLanes);
  }
}

}  // namespace kvferry
