// The numbers of a model, and what follows from them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvferry.h"

namespace kvferry {

constexpr int kPageTokens = KVF_PAGE_TOKENS;

struct Shape : kvf_shape {
  int group() const { return num_heads / num_kv_heads; }  // query heads that share a KV head
  int query_size() const { return num_heads * head_dim; }
  int qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int block_pages() const { return block_size / kPageTokens; }
};

// KVF_OK, or why no model can have this shape.
int32_t check_shape(const kvf_shape& shape);

}  // namespace kvferry
