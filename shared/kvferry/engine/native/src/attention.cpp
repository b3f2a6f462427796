#include "attention.h"

#include <algorithm>

#include "attention_tile.h"
#include "isa.h"

namespace kvferry {
namespace {

int num_tiles(const Segment& segment, int group) { return (segment.rows * group + Isa::kMaxRows - 1) / Isa::kMaxRows; }

// Steps times rows of one tile.
int64_t cost(const Segment& segment, int tile, int group, int window) {
  const int first = tile * Isa::kMaxRows, last = std::min(first + Isa::kMaxRows, segment.rows * group) - 1;
  const int begin = window == 0 ? 0 : std::max(0, segment.position + first / group - window + 1);
  const int end = segment.position + last / group + 1;
  const int steps = (end + kStepPositions - 1) / kStepPositions - begin / kStepPositions;
  return int64_t{steps} * (last - first + 1);
}

int64_t cost(const Segment& segment, int group, int window) {
  int64_t sum = 0;
  for (int tile = 0; tile < num_tiles(segment, group); ++tile) sum += cost(segment, tile, group, window);
  return sum;
}

}  // namespace

void attention(const AttentionCall& call, const std::vector<Segment>& segments, Threads& threads, int thread) {
  int64_t total = 0;
  if (threads.count() > 1) {
    for (const Segment& segment : segments) total += call.num_kv_heads * cost(segment, call.group, call.window);
  }
  // A tile belongs to the thread in whose share of the total cost it begins.
  const int64_t begin = total * thread / threads.count(), end = total * (thread + 1) / threads.count();
  int64_t at = 0;
  const size_t group_size = static_cast<size_t>(call.group) * static_cast<size_t>(call.head_dim);
  for (const Segment& segment : segments) {
    // Head by head, so that a head's pages stay in the cache from tile to tile.
    for (int head = 0; head < call.num_kv_heads; ++head) {
      AttentionTile tile{&call, segment.block_table, head, 0, segment.position, nullptr, nullptr};
      tile.queries = call.queries + static_cast<size_t>(segment.query_row) * static_cast<size_t>(call.query_stride) +
                     static_cast<size_t>(head) * group_size;
      tile.mixed = call.mixed + static_cast<size_t>(segment.row) * static_cast<size_t>(call.mixed_stride) +
                   static_cast<size_t>(head) * group_size;
      for (int i = 0; i < num_tiles(segment, call.group); ++i) {
        if (threads.count() > 1) {
          const int64_t start = at;
          at += cost(segment, i, call.group, call.window);
          if (start < begin || start >= end) continue;
        }
        tile.first = i * Isa::kMaxRows;
        attend_tile(std::min(Isa::kMaxRows, segment.rows * call.group - tile.first))(tile, threads.scratch(thread));
      }
    }
  }
}

}  // namespace kvferry
