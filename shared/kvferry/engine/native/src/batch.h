// One step's sequences, checked and laid out in rows.
#pragma once

#include <cstdint>
#include <vector>

#include "segment.h"
#include "shape.h"

namespace kvferry {

// Rows of a batch are those of its sequences, in order.
struct Batch {
  std::vector<uint32_t> tokens;     // [rows]
  std::vector<int> positions;       // [rows]
  std::vector<Segment> segments;    // all rows
  std::vector<Segment> drawing;     // the rows whose logits are wanted; their `row` counts only these
  std::vector<int> wanted;          // [rows with logits]: their rows, rising

  int rows() const { return static_cast<int>(tokens.size()); }
};

// Fills `batch` (whose memory is reused). Returns KVF_OK, or why the step can't be run. Throws std::bad_alloc.
int32_t make_batch(const Shape& shape, int num_blocks, const kvf_sequence* sequences, int32_t count, Batch& batch);

// Whether a table of `count` blocks covers positions [begin, end) with blocks of the cache. Blocks that hold none of
// these positions are not read and may be anything.
int32_t check_table(const Shape& shape, int num_blocks, const int32_t* block_table, int32_t count, int64_t begin,
                    int64_t end);

}  // namespace kvferry
