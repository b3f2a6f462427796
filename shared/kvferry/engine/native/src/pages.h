// The paged KV cache: where a page lies, and copies between pages and rows of tokens.
//
// A page holds 16 consecutive positions of one layer and one KV head:
//
//   keys    [Dp / 2][16][2] bf16     a vector of pairs is one pair of dimensions of W positions
//   values  [16 / 2][Dp][2] bf16     a vector of pairs is one pair of positions of W dimensions
//
// with Dp = head_dim rounded up to 16. Both products of attention read whole vectors for `dot2`, without a transpose.
// What lies in the padding (dimensions from head_dim on) is never read into a result.
// The cache is [layers][blocks][pages of a block][KV heads] pages.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"
#include "shape.h"

namespace kvferry {

class Pages {
 public:
  Pages() = default;
  // `memory`: bytes(shape, num_blocks), aligned to 64.
  Pages(const Shape& shape, bf16* memory, int num_blocks);

  static uint64_t bytes(const Shape& shape, int num_blocks);
  static int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }

  int num_blocks() const { return num_blocks_; }
  int padded_dim() const { return padded_dim_; }

  // The page of one layer and KV head that holds `position` of the sequence with this table. Values follow the keys.
  bf16* keys(int layer, int head, const int32_t* block_table, int position) const {
    const auto page = static_cast<uint32_t>(position) / kPageTokens;
    const auto block = static_cast<size_t>(block_table[page / block_pages_]);
    return memory_ + layer * layer_values_ +
           ((block * block_pages_ + page % block_pages_) * heads_ + static_cast<size_t>(head)) * page_values_;
  }
  // Of keys and values of one page.
  bf16* values_of(bf16* keys) const { return keys + page_values_ / 2; }
  const bf16* values_of(const bf16* keys) const { return keys + page_values_ / 2; }

  // All layers of block `from` to block `to`.
  void copy_block(int from, int to) const;

 private:
  bf16* memory_ = nullptr;
  int num_blocks_ = 0, num_layers_ = 0, padded_dim_ = 0;
  uint32_t block_pages_ = 1, heads_ = 0;
  size_t page_values_ = 0;   // of keys and values together
  size_t layer_values_ = 0;
};

// How whole pages, or the rows that are copied from them, are written. Streamed goes past the caches where the build's
// vectors are cache lines: nothing is read for being overwritten, and a step that runs beside keeps its caches. Rows
// must then begin at whole lines (`streams_rows`). Call `Isa::end_streams` after the last.
enum class Stores { Cached, Streamed };
inline bool streams_rows(const std::byte* rows, int head_dim, size_t stride) {
  constexpr size_t kLine = 64;
  return reinterpret_cast<uintptr_t>(rows) % kLine == 0 && stride % kLine == 0 &&
         static_cast<size_t>(head_dim) * sizeof(bf16) % kLine == 0;
}

// Copies between `count` positions of a page, from `first` on, and rows of one head: row i of head_dim values begins at
// rows + i * stride bytes, at any alignment. Nothing else of the page or between the rows is touched, so that other
// threads may write other positions of the page meanwhile.
//
// While whole pages are copied, what comes next is asked for line by line: stores take it that the next page's rows
// follow these, loads are told the `next` keys or values (any page will do: nothing is read). Pages lie anywhere, so
// that hardware does not foresee them; asked for all at once they would wait for each other.
template <Stores kStores = Stores::Cached>
void store_keys(bf16* keys, int head_dim, int first, int count, const std::byte* rows, size_t stride);
template <Stores kStores = Stores::Cached>
void store_values(bf16* values, int head_dim, int first, int count, const std::byte* rows, size_t stride);
template <Stores kStores = Stores::Cached>
void load_keys(const bf16* keys, const bf16* next, int head_dim, int first, int count, std::byte* rows, size_t stride);
template <Stores kStores = Stores::Cached>
void load_values(const bf16* values, const bf16* next, int head_dim, int first, int count, std::byte* rows,
                 size_t stride);

}  // namespace kvferry
