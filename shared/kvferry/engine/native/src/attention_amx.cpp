// A tile of attention on tile registers: pages of keys and of values lie as their products read them.
#include "attention_tile.h"

#if defined(KVF_AMX)

#include <algorithm>
#include <cstring>

#include "attention_row.h"

namespace kvferry {
namespace {

static_assert(kStepPages == 4 && kPageTokens == kTileRegisterRows);
constexpr ptrdiff_t kScoreBytes = kStepPositions * ptrdiff_t{sizeof(float)};
constexpr ptrdiff_t kProbabilityBytes = kStepPositions * ptrdiff_t{sizeof(bf16)};
constexpr int kKeyTileValues = kTileRegisterRows * kTileRegisterBytes / static_cast<int>(sizeof(bf16));
constexpr int kDimensions = 32;  // of a product of queries and keys

// scores [rows, kStepPositions] of the step's pages. Registers 0 to 3 are the pages' scores, 4 queries, 5 keys.
void score_step(const StepPages& step, const bf16* queries, int head_dim, float* scores) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int d = 0; d < head_dim; d += kDimensions) {
    const ptrdiff_t at = ptrdiff_t{d / kDimensions} * kKeyTileValues;
    tile_load<4>(queries + d, head_dim * ptrdiff_t{sizeof(bf16)});
    tile_load<5>(step.keys[0] + at, kTileRegisterBytes);
    tile_dot_bf16<0, 4, 5>();
    tile_load<5>(step.keys[1] + at, kTileRegisterBytes);
    tile_dot_bf16<1, 4, 5>();
    tile_load<5>(step.keys[2] + at, kTileRegisterBytes);
    tile_dot_bf16<2, 4, 5>();
    tile_load<5>(step.keys[3] + at, kTileRegisterBytes);
    tile_dot_bf16<3, 4, 5>();
  }
  tile_store<0>(scores, kScoreBytes);
  tile_store<1>(scores + kPageTokens, kScoreBytes);
  tile_store<2>(scores + 2 * kPageTokens, kScoreBytes);
  tile_store<3>(scores + 3 * kPageTokens, kScoreBytes);
}

// sums [rows, head_dim] of the step: dimensions d and, if `four`, twice as many. Registers 0 to 3 are sums, 6
// probabilities, 7 values. More sums are more chains side by side: a product's latency is three times its turn.
template <bool four>
void weigh(const bf16* const* values, const bf16* probabilities, int head_dim, int d, float* sums) {
  const ptrdiff_t line_bytes = head_dim * ptrdiff_t{2 * sizeof(bf16)}, sum_bytes = head_dim * ptrdiff_t{sizeof(float)};
  tile_zero<0>(), tile_zero<1>();
  if (four) tile_zero<2>(), tile_zero<3>();
  for (int page = 0; page < kStepPages; ++page) {
    const bf16* from = values[page] + 2 * d;
    tile_load<6>(probabilities + page * kPageTokens, kProbabilityBytes);
    tile_load<7>(from, line_bytes);
    tile_dot_bf16<0, 6, 7>();
    tile_load<7>(from + 2 * Isa::kLanes, line_bytes);
    tile_dot_bf16<1, 6, 7>();
    if (!four) continue;
    tile_load<7>(from + 4 * Isa::kLanes, line_bytes);
    tile_dot_bf16<2, 6, 7>();
    tile_load<7>(from + 6 * Isa::kLanes, line_bytes);
    tile_dot_bf16<3, 6, 7>();
  }
  tile_store<0>(sums + d, sum_bytes);
  tile_store<1>(sums + d + Isa::kLanes, sum_bytes);
  if (!four) return;
  tile_store<2>(sums + d + 2 * Isa::kLanes, sum_bytes);
  tile_store<3>(sums + d + 3 * Isa::kLanes, sum_bytes);
}

void weigh_step(const bf16* const* values, const bf16* probabilities, int head_dim, float* sums) {
  int d = 0;
  for (; d + 2 * kDimensions <= head_dim; d += 2 * kDimensions) weigh<true>(values, probabilities, head_dim, d, sums);
  if (d < head_dim) weigh<false>(values, probabilities, head_dim, d, sums);
}

bool finite(const bf16* values, int count) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int i = 0; i < count; i += 2 * Isa::kLanes) {
    const __m512i bits = _mm512_and_si512(Isa::load_pairs(values + i), exponent);
    if (_mm512_cmpeq_epi16_mask(bits, exponent) != 0) return false;
  }
  return true;
}

// A page of values, zero at positions that a row does not see. `span` counts from the page's first position.
void hide(const bf16* values, Span span, int head_dim, bf16* out) {
  for (int position = 0; position < kPageTokens; ++position) {
    const bool seen = span.begin <= position && position < span.end;
    for (int d = 0; d < head_dim; ++d) {
      const ptrdiff_t at = (ptrdiff_t{position / 2} * head_dim + d) * 2 + position % 2;
      out[at] = seen ? values[at] : bf16{0};
    }
  }
}

Span in_page(Span span, int page) {
  return {std::clamp(span.begin - page * kPageTokens, 0, kPageTokens),
          std::clamp(span.end - page * kPageTokens, 0, kPageTokens)};
}

void add_row(const float* sums, float* outputs, int head_dim) {
  for (int d = 0; d < head_dim; d += Isa::kLanes) {
    Isa::store(outputs + d, Isa::add(Isa::load(outputs + d), Isa::load(sums + d)));
  }
}

// Whether a value that one of the rows does not see is not finite.
bool hides_any(const StepPages& step, const Span* spans, int rows, int head_dim) {
  for (int page = 0; page < kStepPages; ++page) {
    const auto sees_part = [&](Span span) {
      const Span seen = in_page(span, page);
      return !span.empty() && seen.end - seen.begin < kPageTokens;
    };
    if (std::any_of(spans, spans + rows, sees_part) && !finite(step.values[page], kPageTokens * head_dim)) return true;
  }
  return false;
}

// The step's values into the rows that see some of it. Each row adds the sums of all its pages, where it multiplies
// zeros for positions that it does not see: those are products of zero, whatever finite value lies there. Only if one
// is not finite, each row gets a copy without the positions that it does not see.
void weigh_rows(const StepPages& step, const Span* spans, int rows, const AttentionScratch& scratch, int head_dim) {
  const bool all_whole = std::all_of(spans, spans + rows, [](Span span) { return span.whole(); });
  const bool hides = !all_whole && hides_any(step, spans, rows, head_dim);
  if (!hides) weigh_step(step.values, scratch.probabilities, head_dim, scratch.sums);
  for (int r = 0; r < rows; ++r) {
    if (spans[r].empty()) continue;
    if (hides) {
      const bf16* values[kStepPages];
      for (int page = 0; page < kStepPages; ++page) {
        bf16* copy = scratch.patched + ptrdiff_t{page} * kPageTokens * head_dim;
        hide(step.values[page], in_page(spans[r], page), head_dim, copy);
        values[page] = copy;
      }
      weigh_step(values, scratch.probabilities, head_dim, scratch.sums);
    }
    add_row(scratch.sums + ptrdiff_t{r} * head_dim, scratch.outputs + ptrdiff_t{r} * head_dim, head_dim);
  }
}

}  // namespace

void attend_on_tiles(const AttentionTile& tile, int rows, TileRegisters& registers, std::byte* memory) {
  const AttentionCall& call = *tile.call;
  const int head_dim = call.head_dim;
  const AttentionScratch scratch(memory, rows, head_dim);
  const float factor = call.scale * kLog2E;
  registers.shape(TileUse::Attention, rows);
  Span seen[kTileRegisterRows] = {};
  for (int r = 0; r < rows; ++r) {
    const TileRow row(tile, r);
    seen[r] = row.seen;
    std::memcpy(scratch.queries + ptrdiff_t{r} * head_dim, row.query, static_cast<size_t>(head_dim) * sizeof(bf16));
    begin_row(scratch, r, head_dim);
  }
  const int end = seen[rows - 1].end;  // positions and windows rise with the row
  for (int base = seen[0].begin / kStepPositions * kStepPositions; base < end; base += kStepPositions) {
    StepPages step;
    for (int page = 0; page < kStepPages; ++page) {
      // Beyond the end the last page stands in for those that don't exist.
      const int position = std::min(base + page * kPageTokens, (end - 1) / kPageTokens * kPageTokens);
      step.keys[page] = call.pages->keys(call.layer, tile.kv_head, tile.block_table, position);
      step.values[page] = call.pages->values_of(step.keys[page]);
    }
    score_step(step, scratch.queries, head_dim, scratch.scores);
    Span spans[kTileRegisterRows];
    for (int r = 0; r < rows; ++r) {
      spans[r] = in_step(seen[r], base);
      if (spans[r].empty()) continue;
      raise_maximum(scratch.scores + r * kStepPositions, spans[r], factor, scratch.maxima + r,
                    scratch.totals + r * Isa::kLanes, scratch.outputs + ptrdiff_t{r} * head_dim, head_dim);
    }
    for (int r = 0; r < rows; ++r) {
      bf16* probabilities = scratch.probabilities + r * kStepPositions;
      if (!spans[r].empty()) {
        soften(scratch.scores + r * kStepPositions, probabilities, factor, scratch.maxima[r],
               scratch.totals + r * Isa::kLanes);
      }
      if (spans[r].whole()) continue;
      std::fill(probabilities, probabilities + spans[r].begin, bf16{0});
      std::fill(probabilities + spans[r].end, probabilities + kStepPositions, bf16{0});
    }
    weigh_rows(step, spans, rows, scratch, head_dim);
  }
  for (int r = 0; r < rows; ++r) end_row(scratch, r, head_dim, head_dim, TileRow(tile, r).mixed);
}

}  // namespace kvferry

#endif
