// One tile of attention: the arithmetic, written once over the vector traits.
#pragma once

#include <cstddef>

#include "attention.h"
#include "isa.h"

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

// Rows of the largest tile, for any head and for heads of one size: which products it takes, and so its bits, follow from
// the model alone.
constexpr int kMaxAttentionRows = Isa::kTiles ? 16 : Isa::kMaxRows;
constexpr bool attends_on_tiles(int head_dim) { return Isa::kTiles && head_dim % 32 == 0; }
constexpr int attention_rows(int head_dim) { return attends_on_tiles(head_dim) ? kMaxAttentionRows : Isa::kMaxRows; }

// 1 .. attention_rows(head_dim) rows. `scratch`: attention_scratch_bytes.
void attend(const AttentionTile& tile, int rows, TileRegisters& registers, std::byte* scratch);
void attend_on_tiles(const AttentionTile& tile, int rows, TileRegisters& registers, std::byte* scratch);

}  // namespace kvferry
