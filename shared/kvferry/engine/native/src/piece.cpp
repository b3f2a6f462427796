#include "piece.h"

#include <algorithm>

namespace kvferry {
namespace {

// Calls visit(keys page, first, count, offset of the keys' first row in the frame, of the values') for every page, head
// and layer of a piece. Heads are innermost: their rows lie beside each other in the frame, their pages in the cache.
template <typename Visit>
void walk(const Shape& shape, const Pages& pages, const kvf_piece& piece, const int32_t* block_table, Visit&& visit) {
  const size_t row = static_cast<size_t>(shape.head_dim) * sizeof(bf16);
  const size_t token = static_cast<size_t>(piece.head_end - piece.head_start) * row;
  const size_t half = static_cast<size_t>(piece.token_end - piece.token_start) * token;
  size_t layer_start = 0;
  for (int layer = piece.layer_start; layer < piece.layer_end; ++layer, layer_start += 2 * half) {
    for (int position = piece.token_start; position < piece.token_end;) {
      const int first = position % kPageTokens, count = std::min(kPageTokens - first, piece.token_end - position);
      size_t offset = layer_start + static_cast<size_t>(position - piece.token_start) * token;
      for (int head = piece.head_start; head < piece.head_end; ++head, offset += row) {
        visit(pages.keys(layer, head, block_table, position), first, count, offset, offset + half, token);
      }
      position += count;
    }
  }
}

bool is_range(int32_t start, int32_t end, int32_t limit) { return start >= 0 && start <= end && end <= limit; }

}  // namespace

int32_t check_piece(const Shape& shape, const kvf_piece& piece) {
  if (!is_range(piece.layer_start, piece.layer_end, shape.num_layers) ||
      !is_range(piece.head_start, piece.head_end, shape.num_kv_heads)) {
    return KVF_E_ARGUMENT;
  }
  if (!is_range(piece.token_start, piece.token_end, shape.max_len)) return KVF_E_POSITION;
  return piece_bytes(shape, piece) == 0 ? KVF_E_EMPTY : KVF_OK;
}

uint64_t piece_bytes(const Shape& shape, const kvf_piece& piece) {
  return uint64_t{2} * static_cast<uint64_t>(piece.layer_end - piece.layer_start) *
         static_cast<uint64_t>(piece.token_end - piece.token_start) *
         static_cast<uint64_t>(piece.head_end - piece.head_start) * static_cast<uint64_t>(shape.head_dim) *
         sizeof(bf16);
}

void gather(const Shape& shape, const Pages& pages, const kvf_piece& piece, const int32_t* block_table,
            std::byte* frame) {
  walk(shape, pages, piece, block_table,
       [&](const bf16* keys, int first, int count, size_t key_row, size_t value_row, size_t stride) {
         load_keys(keys, shape.head_dim, first, count, frame + key_row, stride);
         load_values(pages.values_of(keys), shape.head_dim, first, count, frame + value_row, stride);
       });
}

void scatter(const Shape& shape, const Pages& pages, const kvf_piece& piece, const int32_t* block_table,
             const std::byte* frame) {
  walk(shape, pages, piece, block_table,
       [&](bf16* keys, int first, int count, size_t key_row, size_t value_row, size_t stride) {
         store_keys(keys, shape.head_dim, first, count, frame + key_row, stride);
         store_values(pages.values_of(keys), shape.head_dim, first, count, frame + value_row, stride);
       });
}

}  // namespace kvferry
