#include "attention_tile.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "exp2.h"
#include "isa.h"

namespace kvferry {
namespace {

using F = Isa::F;
using P = Isa::P;

constexpr int W = Isa::kLanes;
constexpr int kStepVectors = kStepPositions / W;
constexpr int kStepPages = kStepPositions / kPageTokens;
// Below every score: finite, so that the difference of two is never NaN.
constexpr float kLowest = -1e30f;
constexpr float kLog2E = 1.44269504088896341f;

// Vectors beside each other: as many independent chains as hide the latency and fit into the registers.
constexpr int vectors_for(int rows) {
  if (Isa::kDotsPairs) return rows <= 6 ? 4 : 2;
  return rows <= 2 ? 4 : 2;
}

// Scratch memory of one tile. Row r's parts begin at index r * (their size).
struct Scratch {
  bf16* queries;        // [Dp / 2][rows] pairs
  float* outputs;       // [rows][Dp], not yet divided by the total
  float* scores;        // [rows][kStepPositions]
  bf16* probabilities;  // [rows][kStepPositions]
  float* totals;        // [rows][W]: sums of probabilities by lane
  float* maxima;        // [rows]: the largest score so far, as a power of two
  bf16* patched;        // a page of values with one position of a pair made zero

  Scratch(std::byte* memory, int rows, int padded_dim) {
    const auto take = [&memory](size_t bytes) {
      std::byte* taken = memory;
      memory += (bytes + 63) / 64 * 64;
      return taken;
    };
    const auto count = static_cast<size_t>(rows), dim = static_cast<size_t>(padded_dim);
    queries = reinterpret_cast<bf16*>(take(count * dim * sizeof(bf16)));
    outputs = reinterpret_cast<float*>(take(count * dim * sizeof(float)));
    scores = reinterpret_cast<float*>(take(count * kStepPositions * sizeof(float)));
    probabilities = reinterpret_cast<bf16*>(take(count * kStepPositions * sizeof(bf16)));
    totals = reinterpret_cast<float*>(take(count * W * sizeof(float)));
    maxima = reinterpret_cast<float*>(take(count * sizeof(float)));
    patched = reinterpret_cast<bf16*>(take(dim * kPageTokens * sizeof(bf16)));
  }
};

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

// Pages of the next step are fetched into the second cache a line at a time, while this one's are multiplied. Hardware
// starts anew in each page and comes too late; the first cache has too few outstanding misses to wait for memory.
inline void fetch_ahead(const bf16* line) { __builtin_prefetch(line, 0, 2); }

// scores[r][v * W ...] of V vectors; `keys[v]` is the first pair of vector v, `next[v]` the same in the next step.
template <int R, int V>
void score(const bf16* const* keys, const bf16* const* next, const bf16* queries, int pairs, float* scores) {
  F sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = Isa::zero();
  }
  for (int pair = 0; pair < pairs; ++pair) {
    P k[V];
    for (int v = 0; v < V; ++v) {
      k[v] = Isa::load_pairs(keys[v] + pair * 2 * kPageTokens);
      fetch_ahead(next[v] + pair * 2 * kPageTokens);
    }
    for (int r = 0; r < R; ++r) {
      const P q = Isa::broadcast_pair(queries + (pair * R + r) * 2);
      for (int v = 0; v < V; ++v) sums[r][v] = Isa::dot2(sums[r][v], k[v], q);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Isa::store(scores + r * kStepPositions + v * W, sums[r][v]);
  }
}

// Scores of the step's first `pages` pages, at least one. Where vectors come in blocks that end beyond, the last page is
// read again in place of those that don't exist; nobody sees these scores.
template <int R>
void score_step(const StepPages& step, const StepPages& next_step, int pages, const bf16* queries, int pairs,
                float* scores) {
  constexpr int V = vectors_for(R);
  for (int vector = 0; vector * W < pages * kPageTokens; vector += V) {
    const bf16* keys[V];
    const bf16* next[V];
    for (int v = 0; v < V; ++v) {
      const int lane = (vector + v) * W, page = std::min(lane / kPageTokens, pages - 1);
      keys[v] = step.keys[page] + lane % kPageTokens * 2;
      next[v] = next_step.keys[page] + lane % kPageTokens * 2;
    }
    score<R, V>(keys, next, queries, pairs, scores + vector * W);
  }
}

// One row's step of the online softmax, first half: scores that it doesn't see are hidden, its maximum is raised, and
// what it has so far is scaled to the new maximum.
void raise_maximum(float* scores, Span span, float factor, float* maximum, float* total, float* outputs,
                   int padded_dim) {
  if (!span.whole()) {
    std::fill(scores, scores + span.begin, kLowest);
    std::fill(scores + span.end, scores + kStepPositions, kLowest);
  }
  F top = Isa::load(scores);
  for (int v = 1; v < kStepVectors; ++v) top = Isa::max(top, Isa::load(scores + v * W));
  const float highest = Isa::hmax(top) * factor;
  if (!(highest > *maximum)) return;
  const F shrink = exp2(Isa::set1(*maximum - highest));
  for (int d = 0; d < padded_dim; d += W) {
    Isa::store(outputs + d, Isa::mul(Isa::load(outputs + d), shrink));
  }
  Isa::store(total, Isa::mul(Isa::load(total), shrink));
  *maximum = highest;
}

// Second half: scores to probabilities. Apart from the first, so that the processor finds independent work in the rows.
void soften(const float* scores, bf16* probabilities, float factor, float maximum, float* total) {
  const F power = Isa::set1(factor), offset = Isa::set1(-maximum);
  F sum = Isa::load(total);
  for (int v = 0; v < kStepVectors; ++v) {
    const F p = exp2(Isa::fma(Isa::load(scores + v * W), power, offset));
    sum = Isa::add(sum, p);
    Isa::store_bf16(probabilities + v * W, p);
  }
  Isa::store(total, sum);
}

// outputs[r][V vectors] += probabilities x values over pairs of positions [begin, end). `next`: the pages of the next
// step; `line`: the length of a pair of positions; `offset`: the first dimension.
template <int R, int V>
void weigh(const bf16* const* values, const bf16* const* next, int begin, int end, int line, const bf16* probabilities,
           float* outputs, int padded_dim, int offset) {
  constexpr int kPagePairs = kPageTokens / 2;
  F sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = Isa::load(outputs + r * padded_dim + offset + v * W);
  }
  for (int pair = begin; pair < end;) {
    const int place = pair % kPagePairs * line + offset * 2;
    const bf16* from = values[pair / kPagePairs] + place;
    const bf16* ahead = next[pair / kPagePairs] + place;
    const int stop = std::min(end, (pair / kPagePairs + 1) * kPagePairs);
    for (; pair < stop; ++pair, from += line, ahead += line) {
      P x[V];
      for (int v = 0; v < V; ++v) {
        x[v] = Isa::load_pairs(from + v * 2 * W);
        fetch_ahead(ahead + v * 2 * W);
      }
      for (int r = 0; r < R; ++r) {
        const P p = Isa::broadcast_pair(probabilities + r * kStepPositions + pair * 2);
        for (int v = 0; v < V; ++v) sums[r][v] = Isa::dot2(sums[r][v], x[v], p);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Isa::store(outputs + r * padded_dim + offset + v * W, sums[r][v]);
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
  for (; offset + V * W <= padded_dim; offset += V * W) {
    weigh<R, V>(values, next, begin, end, line, probabilities, outputs, padded_dim, offset);
  }
  for (; offset < head_dim; offset += W) {
    weigh<R, 1>(values, next, begin, end, line, probabilities, outputs, padded_dim, offset);
  }
}

// One row over any span of positions. At an odd edge the pair's other position is made zero, in a copy.
void weigh_row(const StepPages& step, Span span, const bf16* probabilities, float* outputs, int head_dim,
               int padded_dim, bf16* patched) {
  const auto edge = [&](int position) {
    const int pair = position / 2, place = pair % (kPageTokens / 2) * 2 * padded_dim;
    const bf16* from = step.values[position / kPageTokens] + place;
    for (int d = 0; d < padded_dim; d += W) {
      const P both = Isa::load_pairs(from + 2 * d);
      if (position % 2 == 0) {
        Isa::store_pairs(patched + place + 2 * d, Isa::keep_low(both));
      } else {
        const F odd = Isa::high(both);  // the even position's bits are zero
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
void weigh_step(const StepPages& step, const StepPages& next, const Span (&spans)[R], const Scratch& scratch,
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

template <int R>
void attend(const AttentionTile& tile, std::byte* memory) {
  const AttentionCall& call = *tile.call;
  const int head_dim = call.head_dim, padded_dim = call.pages->padded_dim(), pairs = head_dim / 2;
  const Scratch scratch(memory, R, padded_dim);
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
    std::fill_n(scratch.totals + r * W, W, 0.0f);
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
      raise_maximum(scratch.scores + r * kStepPositions, spans[r], factor, scratch.maxima + r, scratch.totals + r * W,
                    scratch.outputs + r * padded_dim, padded_dim);
    }
    for (int r = 0; r < R; ++r) {
      if (spans[r].empty()) continue;
      soften(scratch.scores + r * kStepPositions, scratch.probabilities + r * kStepPositions, factor,
             scratch.maxima[r], scratch.totals + r * W);
    }
    weigh_step<R>(step, next, spans, scratch, head_dim, padded_dim);
  }
  for (int r = 0; r < R; ++r) {
    const F share = Isa::set1(1.0f / Isa::hsum(Isa::load(scratch.totals + r * W)));
    const float* outputs = scratch.outputs + r * padded_dim;
    bf16* mixed = tile.mixed + place[r];
    for (int d = 0; d < head_dim; d += W) {
      Isa::store_bf16_n(mixed + d, Isa::mul(Isa::load(outputs + d), share), std::min(head_dim - d, W));
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

size_t attention_scratch_bytes(int padded_dim) {
  const auto dim = static_cast<size_t>(padded_dim);
  constexpr auto rows = static_cast<size_t>(Isa::kMaxRows);
  const size_t row = dim * (sizeof(bf16) + sizeof(float)) + kStepPositions * (sizeof(float) + sizeof(bf16)) +
                     (W + 1) * sizeof(float);
  return rows * row + dim * kPageTokens * sizeof(bf16) + 7 * 64;
}

}  // namespace kvferry
