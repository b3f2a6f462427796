#include "pages.h"

#include <algorithm>
#include <cstring>

#include "prefetch.h"
#include "zip.h"

namespace kvferry {
namespace {

constexpr size_t kPair = 2 * sizeof(bf16);

std::byte* bytes_of(bf16* values) { return reinterpret_cast<std::byte*>(values); }
const std::byte* bytes_of(const bf16* values) { return reinterpret_cast<const std::byte*>(values); }

// Bytes to a pair of dimensions of one position in a page of keys, and in rows.
size_t key_place(int pair, int position) { return static_cast<size_t>(pair * kPageTokens + position) * kPair; }
size_t row_place(int row, int pair, size_t stride) {
  return static_cast<size_t>(row) * stride + static_cast<size_t>(pair) * kPair;
}

template <Stores kStores, typename V>
[[gnu::always_inline]] inline void put(std::byte* to, const V& vector) {
  if constexpr (kStores == Stores::Streamed && Isa::kStreamsLines) {
    Isa::stream(to, reinterpret_cast<Isa::P>(vector));
  } else {
    std::memcpy(to, &vector, sizeof vector);
  }
}

using WholeSquare = std::integral_constant<int, kWords>;
using HalfSquare = std::integral_constant<int, kWords / 2>;  // what is left of head size 80

// A square of a page of keys: kWords positions of `width` pairs of dimensions, as rows and back. Whole squares have the
// width as a constant, and so no branch and nothing on the stack.
template <Stores kStores, typename Width>
[[gnu::always_inline]] inline void store_square(std::byte* page, const std::byte* rows, size_t stride, Width width) {
  Words square[kWords];
  const size_t bytes = static_cast<size_t>(width) * kPair;
  unroll<kWords>([&](auto i) {
    square[i] = read_part<Words>(rows + i * stride, bytes);
    prefetch<2>(rows + (i + kPageTokens) * stride);
  });
  transpose(square);
  unroll<kWords>([&](auto i) {
    if (i < width) put<kStores>(page + key_place(i, 0), square[i]);
  });
}
template <Stores kStores, typename Width>
[[gnu::always_inline]] inline void load_square(const std::byte* page, const std::byte* ahead, std::byte* rows,
                                               size_t stride, Width width) {
  Words square[kWords] = {};
  unroll<kWords>([&](auto i) {
    if (i < width) square[i] = read_vector<Words>(page + key_place(i, 0));
    prefetch<2>(ahead + key_place(i, 0));
  });
  transpose(square);
  unroll<kWords>([&](auto i) {
    if constexpr (std::is_same_v<Width, WholeSquare>) {
      put<kStores>(rows + i * stride, square[i]);
    } else {
      std::memcpy(rows + i * stride, &square[i], static_cast<size_t>(width) * kPair);
    }
  });
}

}  // namespace

uint64_t Pages::bytes(const Shape& shape, int num_blocks) {
  const uint64_t page = uint64_t{2} * kPageTokens * static_cast<uint64_t>(padded(shape.head_dim)) * sizeof(bf16);
  return page * static_cast<uint64_t>(shape.num_layers) * static_cast<uint64_t>(shape.own_kv_heads()) *
         static_cast<uint64_t>(shape.block_pages()) * static_cast<uint64_t>(num_blocks);
}

Pages::Pages(const Shape& shape, bf16* memory, int num_blocks)
    : memory_(memory),
      num_blocks_(num_blocks),
      num_layers_(shape.num_layers),
      padded_dim_(padded(shape.head_dim)),
      block_pages_(static_cast<uint32_t>(shape.block_pages())),
      heads_(static_cast<uint32_t>(shape.own_kv_heads())),
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

template <Stores kStores>
void store_keys(bf16* keys, int head_dim, int first, int count, const std::byte* rows, size_t stride) {
  std::byte* page = bytes_of(keys);
  const int pairs = head_dim / 2;
  if (count < kPageTokens) {
    for (int row = 0; row < count; ++row) {
      for (int pair = 0; pair < pairs; ++pair) {
        std::memcpy(page + key_place(pair, first + row), rows + row_place(row, pair, stride), kPair);
      }
    }
    return;
  }
  for (int row = 0; row < kPageTokens; row += kWords) {
    int pair = 0;
    for (; pair + kWords <= pairs; pair += kWords) {
      store_square<kStores>(page + key_place(pair, row), rows + row_place(row, pair, stride), stride, WholeSquare{});
    }
    std::byte* rest = page + key_place(pair, row);
    const std::byte* from = rows + row_place(row, pair, stride);
    if (pairs - pair == HalfSquare{}) {
      store_square<kStores>(rest, from, stride, HalfSquare{});
    } else if (pair < pairs) {
      store_square<kStores>(rest, from, stride, pairs - pair);
    }
  }
}

template <Stores kStores>
void load_keys(const bf16* keys, const bf16* next, int head_dim, int first, int count, std::byte* rows,
               size_t stride) {
  const std::byte *page = bytes_of(keys), *ahead = bytes_of(next);
  const int pairs = head_dim / 2;
  if (count < kPageTokens) {
    for (int row = 0; row < count; ++row) {
      for (int pair = 0; pair < pairs; ++pair) {
        std::memcpy(rows + row_place(row, pair, stride), page + key_place(pair, first + row), kPair);
      }
    }
    return;
  }
  for (int row = 0; row < kPageTokens; row += kWords) {
    int pair = 0;
    for (; pair + kWords <= pairs; pair += kWords) {
      load_square<kStores>(page + key_place(pair, row), ahead + key_place(pair, row),
                           rows + row_place(row, pair, stride), stride, WholeSquare{});
    }
    const size_t rest = key_place(pair, row);
    std::byte* to = rows + row_place(row, pair, stride);
    if (pairs - pair == HalfSquare{}) {
      load_square<kStores>(page + rest, ahead + rest, to, stride, HalfSquare{});
    } else if (pair < pairs) {
      load_square<kStores>(page + rest, ahead + rest, to, stride, pairs - pair);
    }
  }
}

template <Stores kStores>
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
      prefetch<2>(rows + kPageTokens * stride + static_cast<size_t>(dim) * 2);
      prefetch<2>(rows + (kPageTokens + 1) * stride + static_cast<size_t>(dim) * 2);
      const Halves low = zip_low(even, odd), high = zip_high(even, odd);
      put<kStores>(to + static_cast<size_t>(dim) * kPair, low);
      put<kStores>(to + static_cast<size_t>(dim) * kPair + sizeof low, high);
    }
    if (dim + kHalves / 2 <= head_dim) {
      const auto even = read_part<Halves>(rows + static_cast<size_t>(dim) * 2, sizeof(Halves) / 2);
      const auto odd = read_part<Halves>(rows + stride + static_cast<size_t>(dim) * 2, sizeof(Halves) / 2);
      put<kStores>(to + static_cast<size_t>(dim) * kPair, zip_low(even, odd));
      dim += kHalves / 2;
    }
    for (; dim < head_dim; ++dim) {
      std::memcpy(to + static_cast<size_t>(dim) * kPair, rows + static_cast<size_t>(dim) * 2, 2);
      std::memcpy(to + static_cast<size_t>(dim) * kPair + 2, rows + stride + static_cast<size_t>(dim) * 2, 2);
    }
  }
  if (position < end) single(position, rows);
}

template <Stores kStores>
void load_values(const bf16* values, const bf16* next, int head_dim, int first, int count, std::byte* rows,
                 size_t stride) {
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
    const std::byte* ahead = bytes_of(next) + static_cast<size_t>(position / 2) * line;
    int dim = 0;
    for (; dim + kHalves <= head_dim; dim += kHalves) {
      const auto low = read_vector<Halves>(from + static_cast<size_t>(dim) * kPair);
      const auto high = read_vector<Halves>(from + static_cast<size_t>(dim) * kPair + sizeof(Halves));
      prefetch<2>(ahead + static_cast<size_t>(dim) * kPair);
      prefetch<2>(ahead + static_cast<size_t>(dim) * kPair + sizeof(Halves));
      const Halves even = unzip_even(low, high), odd = unzip_odd(low, high);
      put<kStores>(rows + static_cast<size_t>(dim) * 2, even);
      put<kStores>(rows + stride + static_cast<size_t>(dim) * 2, odd);
    }
    if (dim + kHalves / 2 <= head_dim) {
      const auto pairs = read_vector<Halves>(from + static_cast<size_t>(dim) * kPair);
      const Halves even = unzip_even(pairs, pairs), odd = unzip_odd(pairs, pairs);
      std::memcpy(rows + static_cast<size_t>(dim) * 2, &even, sizeof even / 2);
      std::memcpy(rows + stride + static_cast<size_t>(dim) * 2, &odd, sizeof odd / 2);
      dim += kHalves / 2;
    }
    for (; dim < head_dim; ++dim) {
      std::memcpy(rows + static_cast<size_t>(dim) * 2, from + static_cast<size_t>(dim) * kPair, 2);
      std::memcpy(rows + stride + static_cast<size_t>(dim) * 2, from + static_cast<size_t>(dim) * kPair + 2, 2);
    }
  }
  if (position < end) single(position, rows);
}

template void store_keys<Stores::Cached>(bf16*, int, int, int, const std::byte*, size_t);
template void store_keys<Stores::Streamed>(bf16*, int, int, int, const std::byte*, size_t);
template void store_values<Stores::Cached>(bf16*, int, int, int, const std::byte*, size_t);
template void store_values<Stores::Streamed>(bf16*, int, int, int, const std::byte*, size_t);
template void load_keys<Stores::Cached>(const bf16*, const bf16*, int, int, int, std::byte*, size_t);
template void load_keys<Stores::Streamed>(const bf16*, const bf16*, int, int, int, std::byte*, size_t);
template void load_values<Stores::Cached>(const bf16*, const bf16*, int, int, int, std::byte*, size_t);
template void load_values<Stores::Streamed>(const bf16*, const bf16*, int, int, int, std::byte*, size_t);

}  // namespace kvferry
