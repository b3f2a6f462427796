// Causal attention of new rows over the paged KV cache.
//
// A tile is up to attention_rows(head_dim) rows of (token, query head of one KV head's group). It walks the context in steps of
// kStepPositions from absolute position 0, with an online softmax in fp32; probabilities are rounded to bf16 before
// they weigh the values.
//
// Exact: what is done to a row's numbers, and in which order, follows from its own position and window alone. A step
// without a position that the row may see is skipped for that row, also when others of its tile take it. In a step that
// it sees in part, only its own positions' values are multiplied: what lies elsewhere in a page, NaN included, reaches
// no product whose result is kept.
#pragma once

#include <cstddef>
#include <vector>

#include "pages.h"
#include "segment.h"
#include "threads.h"

namespace kvferry {

constexpr int kStepPositions = 64;

struct AttentionCall {
  const Pages* pages;
  int layer;
  int window;          // attended positions, the own one included; 0: all
  int num_kv_heads, group, head_dim;
  float scale;
  const bf16* queries;  // rotated; head h of row r at queries + r * query_stride + h * head_dim
  int query_stride;
  bf16* mixed;          // the same for the results
  int mixed_stride;
};

// All threads of the pool call this with the same arguments. Tiles are split by the steps that they take, so that
// threads finish at about the same time; KV of all rows must have been written.
void attention(const AttentionCall& call, const std::vector<Segment>& segments, Threads& threads, int thread);

}  // namespace kvferry
