#include "attention_tile.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "attention_row.h"
#include "attention_scores.h"
#include "attention_values.h"

namespace kvferry {
namespace {

template <int R>
void attend_on_vectors(const AttentionTile& tile, std::byte* memory) {
  const AttentionCall& call = *tile.call;
  const int head_dim = call.head_dim, padded_dim = call.pages->padded_dim(), pairs = head_dim / 2;
  const AttentionScratch scratch(memory, R, padded_dim);
  const float factor = call.scale * kLog2E;
  Span seen[R];
  for (int r = 0; r < R; ++r) {
    const TileRow row(tile, r);
    seen[r] = row.seen;
    for (int pair = 0; pair < pairs; ++pair) {
      std::memcpy(scratch.queries + (pair * R + r) * 2, row.query + pair * 2, 2 * sizeof(bf16));
    }
    begin_row(scratch, r, padded_dim);
  }
  // Positions and windows rise with the row.
  const int first_step = seen[0].begin / kStepPositions, end = seen[R - 1].end;
  for (int base = first_step * kStepPositions; base < end; base += kStepPositions) {
    Span spans[R];
    for (int r = 0; r < R; ++r) spans[r] = in_step(seen[r], base);
    const int pages = std::min((end - base + kPageTokens - 1) / kPageTokens, kStepPages);
    StepPages step, next;
    const auto find = [&](StepPages& found, int page, int position) {
      found.keys[page] = call.pages->keys(call.layer, tile.kv_head, tile.block_table, position);
      found.values[page] = call.pages->values_of(found.keys[page]);
    };
    for (int page = 0; page < pages; ++page) {
      const int position = base + page * kPageTokens;
      find(step, page, position);
      find(next, page, std::min(position + kStepPositions, end - 1));
    }
    score_step<R>(step, next, pages, scratch.queries, pairs, scratch.scores);
    for (int r = 0; r < R; ++r) {
      if (spans[r].empty()) continue;
      raise_maximum(scratch.scores + r * kStepPositions, spans[r], factor, scratch.maxima + r,
                    scratch.totals + r * Isa::kLanes, scratch.outputs + r * padded_dim, padded_dim);
    }
    for (int r = 0; r < R; ++r) {
      if (spans[r].empty()) continue;
      soften(scratch.scores + r * kStepPositions, scratch.probabilities + r * kStepPositions, factor,
             scratch.maxima[r], scratch.totals + r * Isa::kLanes);
    }
    weigh_step<R>(step, next, spans, scratch, head_dim, padded_dim);
  }
  for (int r = 0; r < R; ++r) end_row(scratch, r, head_dim, padded_dim, TileRow(tile, r).mixed);
}

using Attend = void (*)(const AttentionTile& tile, std::byte* scratch);

template <int... R>
Attend pick(int rows, std::integer_sequence<int, R...>) {
  static constexpr Attend tiles[] = {attend_on_vectors<R + 1>...};
  return tiles[rows - 1];
}

}  // namespace

void attend(const AttentionTile& tile, int rows, [[maybe_unused]] TileRegisters& registers, std::byte* scratch) {
  if constexpr (Isa::kTiles) {
    if (attends_on_tiles(tile.call->head_dim)) {
      attend_on_tiles(tile, rows, registers, scratch);
      return;
    }
  }
  pick(rows, std::make_integer_sequence<int, Isa::kMaxRows>{})(tile, scratch);
}

}  // namespace kvferry
