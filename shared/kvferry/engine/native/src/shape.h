// The numbers of a model, and what follows from them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvferry.h"

namespace kvferry {

constexpr int kPageTokens = KVF_PAGE_TOKENS;

inline int size_of(const kvf_range& range) { return range.end - range.begin; }

// A checked kvf_shape whose ranges are filled in.
struct Shape : kvf_shape {
  explicit Shape(const kvf_shape& checked);

  bool split() const { return ranks > 1; }
  // Of the whole model.
  int query_size() const { return num_heads * head_dim; }
  int block_pages() const { return block_size / kPageTokens; }
  // Of this rank.
  int own_heads() const { return size_of(heads); }
  int own_kv_heads() const { return size_of(kv_heads); }
  int own_hidden() const { return size_of(hidden); }
  int own_intermediate() const { return size_of(intermediate); }
  int own_vocab() const { return size_of(vocab); }
  int own_qkv_size() const { return (own_heads() + 2 * own_kv_heads()) * head_dim; }
  int own_group() const { return own_heads() / own_kv_heads(); }  // query heads that share a KV head
};

// KVF_OK, or why no model can have this shape.
int32_t check_shape(const kvf_shape& shape);

}  // namespace kvferry
