// Pieces of KV between blocks and frames [layers, 2 (K, V), tokens, heads, head_dim].
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pages.h"

namespace kvferry {

int32_t check_piece(const Shape& shape, const kvf_piece& piece);
// Whether two pieces differ in nothing but their heads.
bool same_frame(const kvf_piece& left, const kvf_piece& right);
// Of the whole frame.
uint64_t piece_bytes(const Shape& shape, const kvf_piece& piece);

// What one cache has of a piece; that of a whole model all of it, that of a rank some heads.
struct Part {
  Pages pages;
  kvf_piece piece;
};

// Of checked pieces, which differ in nothing but their heads. They share nothing with a step but the blocks that they
// touch. Parts are copied page by page, so that memory sees the frame's rows whole, as if there were one.
void gather(const Shape& shape, const std::vector<Part>& parts, const int32_t* block_table, std::byte* frame);
void scatter(const Shape& shape, const std::vector<Part>& parts, const int32_t* block_table, const std::byte* frame);

}  // namespace kvferry
