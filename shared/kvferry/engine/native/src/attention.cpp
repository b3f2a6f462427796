#include "attention.h"

#include <algorithm>

#include "attention_tile.h"
#include "isa.h"

namespace kvferry {
namespace {

int num_tiles(const Segment& segment, int group, int most) { return (segment.rows * group + most - 1) / most; }

// Steps times rows of one tile.
int64_t cost(const Segment& segment, int tile, int group, int most, int window) {
  const int first = tile * most, last = std::min(first + most, segment.rows * group) - 1;
  const int begin = window == 0 ? 0 : std::max(0, segment.position + first / group - window + 1);
  const int end = segment.position + last / group + 1;
  const int steps = (end + kStepPositions - 1) / kStepPositions - begin / kStepPositions;
  return int64_t{steps} * (last - first + 1);
}

int64_t cost(const Segment& segment, int group, int most, int window) {
  int64_t sum = 0;
  for (int tile = 0; tile < num_tiles(segment, group, most); ++tile) sum += cost(segment, tile, group, most, window);
  return sum;
}

}  // namespace

void attention(const AttentionCall& call, const std::vector<Segment>& segments, Threads& threads, int thread) {
  const int most = attention_rows(call.head_dim);
  TileRegisters registers;
  int64_t total = 0;
  if (threads.count() > 1) {
    for (const Segment& segment : segments) total += call.num_kv_heads * cost(segment, call.group, most, call.window);
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
      for (int i = 0; i < num_tiles(segment, call.group, most); ++i) {
        if (threads.count() > 1) {
          const int64_t start = at;
          at += cost(segment, i, call.group, most, call.window);
          if (start < begin || start >= end) continue;
        }
        tile.first = i * most;
        attend(tile, std::min(most, segment.rows * call.group - tile.first), registers, threads.scratch(thread));
      }
    }
  }
}

}  // namespace kvferry
