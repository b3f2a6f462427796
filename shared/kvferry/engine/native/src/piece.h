// Pieces of KV between blocks and frames [layers, 2 (K, V), tokens, heads, head_dim].
#pragma once

#include <cstddef>
#include <cstdint>

#include "pages.h"

namespace kvferry {

int32_t check_piece(const Shape& shape, const kvf_piece& piece);
// Of the whole frame.
uint64_t piece_bytes(const Shape& shape, const kvf_piece& piece);

// Of a checked piece. They share nothing with a step but the blocks that they touch.
void gather(const Shape& shape, const Pages& pages, const kvf_piece& piece, const int32_t* block_table,
            std::byte* frame);
void scatter(const Shape& shape, const Pages& pages, const kvf_piece& piece, const int32_t* block_table,
             const std::byte* frame);

}  // namespace kvferry
