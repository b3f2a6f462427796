#include "piece.h"

#include <algorithm>

#include "isa.h"

namespace kvferry {
namespace {

// Pages ahead of the one that is worked on whose lines are asked for meanwhile.
constexpr int kAhead = 2;

int frame_heads(const kvf_piece& piece) {
  return piece.frame_heads == 0 ? piece.head_end - piece.head_start : piece.frame_heads;
}

// Bytes of a token's row of heads in the frame.
size_t token_bytes(const Shape& shape, const kvf_piece& piece) {
  return static_cast<size_t>(frame_heads(piece)) * static_cast<size_t>(shape.head_dim) * sizeof(bf16);
}

// Calls visit(keys page, its values, the keys and values that come later, first, count, offset of the keys' first row in
// the frame, of the values', their stride) for every page, head and layer of a piece. Heads are innermost: their rows
// lie beside each other in the frame, their pages in the cache.
template <typename Visit>
void walk(const Shape& shape, const std::vector<Part>& parts, const int32_t* block_table, Visit&& visit) {
  const kvf_piece& piece = parts.front().piece;
  const size_t row = static_cast<size_t>(shape.head_dim) * sizeof(bf16);
  const size_t token = token_bytes(shape, piece);
  const size_t half = static_cast<size_t>(piece.token_end - piece.token_start) * token;
  const int first_page = piece.token_start / kPageTokens;
  const int layer_pages = (piece.token_end + kPageTokens - 1) / kPageTokens - first_page;
  const int num_pages = (piece.layer_end - piece.layer_start) * layer_pages;
  const auto keys = [&](const Pages& pages, int index, int head) {
    const int page = first_page + index % layer_pages;
    return pages.keys(piece.layer_start + index / layer_pages, head, block_table, page * kPageTokens);
  };
  for (int index = 0; index < num_pages; ++index) {
    const int page_start = (first_page + index % layer_pages) * kPageTokens;
    const int begin = std::max(page_start, piece.token_start);
    const int end = std::min(page_start + kPageTokens, piece.token_end);
    const size_t rows = static_cast<size_t>(index / layer_pages) * 2 * half +
                        static_cast<size_t>(begin - piece.token_start) * token;
    for (const Part& part : parts) {
      size_t offset = rows + static_cast<size_t>(part.piece.frame_head) * row;
      for (int head = part.piece.head_start; head < part.piece.head_end; ++head, offset += row) {
        bf16* here = keys(part.pages, index, head);
        const bf16* later = keys(part.pages, std::min(index + kAhead, num_pages - 1), head);
        visit(here, part.pages.values_of(here), later, part.pages.values_of(later), begin - page_start, end - begin,
              offset, offset + half, token);
      }
    }
  }
}

bool is_range(int32_t start, int32_t end, int32_t limit) { return start >= 0 && start <= end && end <= limit; }

}  // namespace

int32_t check_piece(const Shape& shape, const kvf_piece& piece) {
  if (!is_range(piece.layer_start, piece.layer_end, shape.num_layers) ||
      !is_range(piece.head_start, piece.head_end, shape.own_kv_heads()) ||
      piece.frame_heads < 0 || piece.frame_heads > shape.num_kv_heads || piece.frame_head < 0 ||
      piece.frame_head + piece.head_end - piece.head_start > frame_heads(piece)) {
    return KVF_E_ARGUMENT;
  }
  if (!is_range(piece.token_start, piece.token_end, shape.max_len)) return KVF_E_POSITION;
  return piece.head_start == piece.head_end || piece_bytes(shape, piece) == 0 ? KVF_E_EMPTY : KVF_OK;
}

bool same_frame(const kvf_piece& left, const kvf_piece& right) {
  return left.layer_start == right.layer_start && left.layer_end == right.layer_end &&
         left.token_start == right.token_start && left.token_end == right.token_end &&
         frame_heads(left) == frame_heads(right);
}

uint64_t piece_bytes(const Shape& shape, const kvf_piece& piece) {
  return uint64_t{2} * static_cast<uint64_t>(piece.layer_end - piece.layer_start) *
         static_cast<uint64_t>(piece.token_end - piece.token_start) * uint64_t{token_bytes(shape, piece)};
}

template <Stores kStores>
void gather_as(const Shape& shape, const std::vector<Part>& parts, const int32_t* block_table, std::byte* frame) {
  walk(shape, parts, block_table,
       [&](const bf16* keys, const bf16* values, const bf16* later_keys, const bf16* later_values, int first, int count,
           size_t key_row, size_t value_row, size_t stride) {
         load_keys<kStores>(keys, later_keys, shape.head_dim, first, count, frame + key_row, stride);
         load_values<kStores>(values, later_values, shape.head_dim, first, count, frame + value_row, stride);
       });
  Isa::end_streams();
}

void gather(const Shape& shape, const std::vector<Part>& parts, const int32_t* block_table, std::byte* frame) {
  if (streams_rows(frame, shape.head_dim, token_bytes(shape, parts.front().piece))) {
    gather_as<Stores::Streamed>(shape, parts, block_table, frame);
  } else {
    gather_as<Stores::Cached>(shape, parts, block_table, frame);
  }
}

void scatter(const Shape& shape, const std::vector<Part>& parts, const int32_t* block_table, const std::byte* frame) {
  walk(shape, parts, block_table,
       [&](bf16* keys, bf16* values, const bf16*, const bf16*, int first, int count, size_t key_row, size_t value_row,
           size_t stride) {
         store_keys<Stores::Streamed>(keys, shape.head_dim, first, count, frame + key_row, stride);
         store_values<Stores::Streamed>(values, shape.head_dim, first, count, frame + value_row, stride);
       });
  Isa::end_streams();
}

}  // namespace kvferry
