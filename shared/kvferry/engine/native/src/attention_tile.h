// One tile of attention: the arithmetic, written once over the vector traits.
#pragma once

#include <cstddef>

#include "attention.h"

namespace kvferry {

// Rows of a tile are consecutive in (token, query head of the group), token-major.
struct AttentionTile {
  const AttentionCall* call;
  const int32_t* block_table;
  int kv_head;
  int first;             // index of the first row
  int position;          // of the segment's token 0
  const bf16* queries;   // of the segment's token 0, query head 0 of the group
  bf16* mixed;
};

using AttendTile = void (*)(const AttentionTile& tile, std::byte* scratch);

// For 1 .. Isa::kMaxRows rows.
AttendTile attend_tile(int rows);

}  // namespace kvferry
