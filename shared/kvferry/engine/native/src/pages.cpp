#include "pages.h"

#include <algorithm>
#include <cstring>

#include "zip.h"

namespace kvferry {
namespace {

constexpr size_t kPair = 2 * sizeof(bf16);

std::byte* bytes_of(bf16* values) { return reinterpret_cast<std::byte*>(values); }
const std::byte* bytes_of(const bf16* values) { return reinterpret_cast<const std::byte*>(values); }

}  // namespace

uint64_t Pages::bytes(const Shape& shape, int num_blocks) {
  const uint64_t page = uint64_t{2} * kPageTokens * static_cast<uint64_t>(padded(shape.head_dim)) * sizeof(bf16);
  return page * static_cast<uint64_t>(shape.num_layers) * static_cast<uint64_t>(shape.num_kv_heads) *
         static_cast<uint64_t>(shape.block_pages()) * static_cast<uint64_t>(num_blocks);
}

Pages::Pages(const Shape& shape, bf16* memory, int num_blocks)
    : memory_(memory),
      num_blocks_(num_blocks),
      num_layers_(shape.num_layers),
      padded_dim_(padded(shape.head_dim)),
      block_pages_(static_cast<uint32_t>(shape.block_pages())),
      heads_(static_cast<uint32_t>(shape.num_kv_heads)),
      page_values_(size_t{2} * kPageTokens * static_cast<size_t>(padded_dim_)),
      layer_values_(page_values_ * heads_ * block_pages_ * static_cast<size_t>(num_blocks)) {}

void Pages::copy_block(int from, int to) const {
  if (from == to) return;
  const size_t block = size_t{block_pages_} * heads_ * page_values_;
  for (int layer = 0; layer < num_layers_; ++layer) {
    bf16* values = memory_ + static_cast<size_t>(layer) * layer_values_;
    std::memcpy(values + static_cast<size_t>(to) * block, values + static_cast<size_t>(from) * block,
                block * sizeof(bf16));
  }
}

void store_keys(bf16* keys, int head_dim, int first, int count, const std::byte* rows, size_t stride) {
  std::byte* page = bytes_of(keys);
  const int pairs = head_dim / 2;
  if (count < kPageTokens) {
    for (int row = 0; row < count; ++row) {
      for (int pair = 0; pair < pairs; ++pair) {
        std::memcpy(page + static_cast<size_t>(pair * kPageTokens + first + row) * kPair,
                    rows + static_cast<size_t>(row) * stride + static_cast<size_t>(pair) * kPair, kPair);
      }
    }
    return;
  }
  for (int row = 0; row < kPageTokens; row += kWords) {
    for (int pair = 0; pair < pairs; pair += kWords) {
      const std::byte* from = rows + static_cast<size_t>(row) * stride + static_cast<size_t>(pair) * kPair;
      std::byte* to = page + static_cast<size_t>(pair * kPageTokens + row) * kPair;
      const int width = std::min(pairs - pair, kWords);
      Words block[kWords];
      if (width == kWords) {
        for (int i = 0; i < kWords; ++i) block[i] = read_vector<Words>(from + static_cast<size_t>(i) * stride);
      } else {
        for (int i = 0; i < kWords; ++i) {
          block[i] = read_part<Words>(from + static_cast<size_t>(i) * stride, static_cast<size_t>(width) * kPair);
        }
      }
      transpose(block);
      for (int i = 0; i < width; ++i) {
        std::memcpy(to + static_cast<size_t>(i) * kPageTokens * kPair, &block[i], sizeof(Words));
      }
    }
  }
}

void load_keys(const bf16* keys, int head_dim, int first, int count, std::byte* rows, size_t stride) {
  const std::byte* page = bytes_of(keys);
  const int pairs = head_dim / 2;
  if (count < kPageTokens) {
    for (int row = 0; row < count; ++row) {
      for (int pair = 0; pair < pairs; ++pair) {
        std::memcpy(rows + static_cast<size_t>(row) * stride + static_cast<size_t>(pair) * kPair,
                    page + static_cast<size_t>(pair * kPageTokens + first + row) * kPair, kPair);
      }
    }
    return;
  }
  for (int row = 0; row < kPageTokens; row += kWords) {
    for (int pair = 0; pair < pairs; pair += kWords) {
      const std::byte* from = page + static_cast<size_t>(pair * kPageTokens + row) * kPair;
      std::byte* to = rows + static_cast<size_t>(row) * stride + static_cast<size_t>(pair) * kPair;
      const int width = std::min(pairs - pair, kWords);
      Words block[kWords] = {};
      for (int i = 0; i < width; ++i) {
        block[i] = read_vector<Words>(from + static_cast<size_t>(i) * kPageTokens * kPair);
      }
      transpose(block);
      if (width == kWords) {
        for (int i = 0; i < kWords; ++i) std::memcpy(to + static_cast<size_t>(i) * stride, &block[i], sizeof(Words));
      } else {
        for (int i = 0; i < kWords; ++i) {
          std::memcpy(to + static_cast<size_t>(i) * stride, &block[i], static_cast<size_t>(width) * kPair);
        }
      }
    }
  }
}

void store_values(bf16* values, int head_dim, int first, int count, const std::byte* rows, size_t stride) {
  const size_t line = static_cast<size_t>(Pages::padded(head_dim)) * kPair;  // of a pair of positions
  const auto single = [&](int position, const std::byte* row) {
    std::byte* to = bytes_of(values) + static_cast<size_t>(position / 2) * line + static_cast<size_t>(position % 2) * 2;
    for (int dim = 0; dim < head_dim; ++dim) {
      std::memcpy(to + static_cast<size_t>(dim) * kPair, row + static_cast<size_t>(dim) * 2, 2);
    }
  };
  int position = first;
  const int end = first + count;
  if (position % 2 != 0 && position < end) {
    single(position++, rows);
    rows += stride;
  }
  for (; position + 1 < end; position += 2, rows += 2 * stride) {
    std::byte* to = bytes_of(values) + static_cast<size_t>(position / 2) * line;
    int dim = 0;
    for (; dim + kHalves <= head_dim; dim += kHalves) {
      const auto even = read_vector<Halves>(rows + static_cast<size_t>(dim) * 2);
      const auto odd = read_vector<Halves>(rows + stride + static_cast<size_t>(dim) * 2);
      const Halves low = zip_low(even, odd), high = zip_high(even, odd);
      std::memcpy(to + static_cast<size_t>(dim) * kPair, &low, sizeof low);
      std::memcpy(to + static_cast<size_t>(dim) * kPair + sizeof low, &high, sizeof high);
    }
    for (; dim < head_dim; ++dim) {
      std::memcpy(to + static_cast<size_t>(dim) * kPair, rows + static_cast<size_t>(dim) * 2, 2);
      std::memcpy(to + static_cast<size_t>(dim) * kPair + 2, rows + stride + static_cast<size_t>(dim) * 2, 2);
    }
  }
  if (position < end) single(position, rows);
}

void load_values(const bf16* values, int head_dim, int first, int count, std::byte* rows, size_t stride) {
  const size_t line = static_cast<size_t>(Pages::padded(head_dim)) * kPair;
  const auto single = [&](int position, std::byte* row) {
    const std::byte* from =
        bytes_of(values) + static_cast<size_t>(position / 2) * line + static_cast<size_t>(position % 2) * 2;
    for (int dim = 0; dim < head_dim; ++dim) {
      std::memcpy(row + static_cast<size_t>(dim) * 2, from + static_cast<size_t>(dim) * kPair, 2);
    }
  };
  int position = first;
  const int end = first + count;
  if (position % 2 != 0 && position < end) {
    single(position++, rows);
    rows += stride;
  }
  for (; position + 1 < end; position += 2, rows += 2 * stride) {
    const std::byte* from = bytes_of(values) + static_cast<size_t>(position / 2) * line;
    int dim = 0;
    for (; dim + kHalves <= head_dim; dim += kHalves) {
      const auto low = read_vector<Halves>(from + static_cast<size_t>(dim) * kPair);
      const auto high = read_vector<Halves>(from + static_cast<size_t>(dim) * kPair + sizeof(Halves));
      const Halves even = unzip_even(low, high), odd = unzip_odd(low, high);
      std::memcpy(rows + static_cast<size_t>(dim) * 2, &even, sizeof even);
      std::memcpy(rows + stride + static_cast<size_t>(dim) * 2, &odd, sizeof odd);
    }
    for (; dim < head_dim; ++dim) {
      std::memcpy(rows + static_cast<size_t>(dim) * 2, from + static_cast<size_t>(dim) * kPair, 2);
      std::memcpy(rows + stride + static_cast<size_t>(dim) * 2, from + static_cast<size_t>(dim) * kPair + 2, 2);
    }
  }
  if (position < end) single(position, rows);
}

}  // namespace kvferry
