// The rows of one sequence in a stage of a step.
#pragma once

#include <cstdint>

namespace kvferry {

struct Segment {
  const int32_t* block_table;
  int position;   // of the first row
  int rows;       // at consecutive positions
  int query_row;  // where they begin in the QKV buffer
  int row;        // where they begin in the stage's other buffers
};

}  // namespace kvferry
