// A tile of attention takes positions in steps: their pages, and what a row sees of them.
#pragma once

#include "attention.h"
#include "isa.h"
#include "prefetch.h"

namespace kvferry {

constexpr int kStepVectors = kStepPositions / Isa::kLanes;
constexpr int kStepPages = kStepPositions / kPageTokens;

// Vectors beside each other: as many independent chains as hide the latency and fit into the registers.
constexpr int vectors_for(int rows) {
  if (Isa::kDotsPairs) return rows <= 6 ? 4 : 2;
  return rows <= 2 ? 4 : 2;
}

// The positions of a step, counted from its first, that a row sees.
struct Span {
  int begin, end;
  bool empty() const { return begin >= end; }
  bool whole() const { return begin == 0 && end == kStepPositions; }
};

// The pages of one step.
struct StepPages {
  const bf16* keys[kStepPages];
  const bf16* values[kStepPages];
};

// Pages of the next step are fetched while this one's are multiplied: hardware starts anew in each page and comes too
// late.
inline void fetch_ahead(const bf16* line) { prefetch<2>(line); }

}  // namespace kvferry
