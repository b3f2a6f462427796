// What every tile of attention does with each of its rows: where it lies, what it sees, and how it ends.
#pragma once

#include <algorithm>

#include "attention_scratch.h"
#include "attention_softmax.h"
#include "attention_tile.h"

namespace kvferry {

constexpr float kLog2E = 1.44269504088896341f;

struct TileRow {
  Span seen;  // absolute positions
  const bf16* query;
  bf16* mixed;

  TileRow(const AttentionTile& tile, int row) {
    const AttentionCall& call = *tile.call;
    const int token = (tile.first + row) / call.group, head = (tile.first + row) % call.group;
    const int position = tile.position + token, in_head = head * call.head_dim;
    seen = {call.window == 0 ? 0 : std::max(0, position - call.window + 1), position + 1};
    query = tile.queries + static_cast<size_t>(token) * static_cast<size_t>(call.query_stride) + in_head;
    mixed = tile.mixed + static_cast<size_t>(token) * static_cast<size_t>(call.mixed_stride) + in_head;
  }
};

// What is seen of the step that begins at `base`.
inline Span in_step(Span seen, int base) {
  return {std::clamp(seen.begin - base, 0, kStepPositions), std::clamp(seen.end - base, 0, kStepPositions)};
}

inline void begin_row(const AttentionScratch& scratch, int row, int padded_dim) {
  scratch.maxima[row] = kLowest;
  std::fill_n(scratch.totals + row * Isa::kLanes, Isa::kLanes, 0.0f);
  std::fill_n(scratch.outputs + row * padded_dim, padded_dim, 0.0f);
}

// What the row has so far, divided by its total.
inline void end_row(const AttentionScratch& scratch, int row, int head_dim, int padded_dim, bf16* mixed) {
  const Isa::F share = Isa::set1(1.0f / Isa::hsum(Isa::load(scratch.totals + row * Isa::kLanes)));
  const float* outputs = scratch.outputs + row * padded_dim;
  for (int d = 0; d < head_dim; d += Isa::kLanes) {
    Isa::store_bf16_n(mixed + d, Isa::mul(Isa::load(outputs + d), share), std::min(head_dim - d, Isa::kLanes));
  }
}

}  // namespace kvferry
