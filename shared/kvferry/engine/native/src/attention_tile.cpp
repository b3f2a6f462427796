#include "attention_tile.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "attention_scores.h"
#include "attention_scratch.h"
#include "attention_softmax.h"
#include "attention_values.h"

namespace kvferry {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

template <int R>
void attend(const AttentionTile& tile, std::byte* memory) {
  const AttentionCall& call = *tile.call;
  const int head_dim = call.head_dim, padded_dim = call.pages->padded_dim(), pairs = head_dim / 2;
  const AttentionScratch scratch(memory, R, padded_dim);
  const float factor = call.scale * kLog2E;
  Span seen[R];  // absolute positions
  size_t place[R];  // of the row's head in queries and results
  for (int r = 0; r < R; ++r) {
    const int token = (tile.first + r) / call.group, head = (tile.first + r) % call.group;
    const int position = tile.position + token;
    seen[r] = {call.window == 0 ? 0 : std::max(0, position - call.window + 1), position + 1};
    const bf16* query = tile.queries + static_cast<size_t>(token) * static_cast<size_t>(call.query_stride) +
                        head * head_dim;
    for (int pair = 0; pair < pairs; ++pair) {
      std::memcpy(scratch.queries + (pair * R + r) * 2, query + pair * 2, 2 * sizeof(bf16));
    }
    place[r] = static_cast<size_t>(token) * static_cast<size_t>(call.mixed_stride) +
               static_cast<size_t>(head * head_dim);
    scratch.maxima[r] = kLowest;
    std::fill_n(scratch.totals + r * Isa::kLanes, Isa::kLanes, 0.0f);
    std::fill_n(scratch.outputs + r * padded_dim, padded_dim, 0.0f);
  }
  // Positions and windows rise with the row.
  const int first_step = seen[0].begin / kStepPositions, end = seen[R - 1].end;
  for (int base = first_step * kStepPositions; base < end; base += kStepPositions) {
    Span spans[R];
    for (int r = 0; r < R; ++r) {
      spans[r] = {std::clamp(seen[r].begin - base, 0, kStepPositions),
                  std::clamp(seen[r].end - base, 0, kStepPositions)};
    }
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
  for (int r = 0; r < R; ++r) {
    const Isa::F share = Isa::set1(1.0f / Isa::hsum(Isa::load(scratch.totals + r * Isa::kLanes)));
    const float* outputs = scratch.outputs + r * padded_dim;
    bf16* mixed = tile.mixed + place[r];
    for (int d = 0; d < head_dim; d += Isa::kLanes) {
      Isa::store_bf16_n(mixed + d, Isa::mul(Isa::load(outputs + d), share), std::min(head_dim - d, Isa::kLanes));
    }
  }
}

template <int... R>
AttendTile pick(int rows, std::integer_sequence<int, R...>) {
  static constexpr AttendTile tiles[] = {attend<R + 1>...};
  return tiles[rows - 1];
}

}  // namespace

AttendTile attend_tile(int rows) { return pick(rows, std::make_integer_sequence<int, Isa::kMaxRows>{}); }

}  // namespace kvferry
