#include "shape.h"

#include <cmath>

#include "pack.h"

namespace kvferry {
namespace {

// Queries, keys and values are three widths at most, gate and up two.
static_assert(kMaxK == KVF_MAX_WIDTH && kMaxN == KVF_MAX_DIMENSION && 3 * kMaxK <= kMaxN);

bool within(int32_t value, int64_t low, int64_t high) { return low <= value && value <= high; }
bool is_flag(int32_t value) { return value == 0 || value == 1; }
bool is_part(const kvf_range& range, int32_t whole) {
  return range.begin >= 0 && range.begin < range.end && range.end <= whole;
}

// Of a shape that is good as a whole.
int32_t check_rank(const kvf_shape& s) {
  if (s.ranks == 0) return KVF_OK;
  if (!within(s.ranks, 1, KVF_MAX_RANKS) || !within(s.rank, 0, s.ranks - 1) ||
      !within(s.max_rows, 1, KVF_MAX_STEP_ROWS) || !is_part(s.heads, s.num_heads) ||
      !is_part(s.kv_heads, s.num_kv_heads) || !is_part(s.hidden, s.hidden_size) ||
      !is_part(s.intermediate, s.intermediate_size) || !is_part(s.vocab, s.vocab_size)) {
    return KVF_E_ARGUMENT;
  }
  const int group = s.num_heads / s.num_kv_heads;
  const bool whole_groups = s.heads.begin == s.kv_heads.begin * group && s.heads.end == s.kv_heads.end * group;
  const bool one_group = size_of(s.kv_heads) == 1 && s.heads.begin >= s.kv_heads.begin * group &&
                         s.heads.end <= s.kv_heads.end * group;
  return whole_groups || one_group ? KVF_OK : KVF_E_SHAPE;
}

}  // namespace

Shape::Shape(const kvf_shape& checked) : kvf_shape(checked) {
  if (ranks != 0) return;
  ranks = 1;
  heads = {0, num_heads};
  kv_heads = {0, num_kv_heads};
  hidden = {0, hidden_size};
  intermediate = {0, intermediate_size};
  vocab = {0, vocab_size};
}

int32_t check_shape(const kvf_shape& s) {
  // Each factor is bounded first, so that no product below overflows.
  if (!within(s.num_layers, 1, KVF_MAX_LAYERS) || !within(s.hidden_size, 1, KVF_MAX_WIDTH) ||
      !within(s.intermediate_size, 1, KVF_MAX_WIDTH) || !within(s.num_heads, 1, KVF_MAX_WIDTH) ||
      !within(s.num_kv_heads, 1, s.num_heads) || !within(s.head_dim, 2, KVF_MAX_HEAD_DIM) ||
      !within(s.vocab_size, 1, KVF_MAX_DIMENSION) || !within(s.max_len, 1, KVF_MAX_LEN) ||
      !within(s.block_size, kPageTokens, KVF_MAX_BLOCK_SIZE) || !within(s.threads, 1, KVF_MAX_THREADS)) {
    return KVF_E_ARGUMENT;
  }
  if (!is_flag(s.tied) || !is_flag(s.qkv_bias) || !is_flag(s.output_bias) || !is_flag(s.mlp_bias) ||
      !is_flag(s.qk_norm) || !within(s.quantization, KVF_BF16, KVF_INT8) || !(s.rms_norm_eps >= 0) ||
      !std::isfinite(s.rms_norm_eps)) {
    return KVF_E_ARGUMENT;
  }
  if (s.num_heads % s.num_kv_heads != 0 || s.head_dim % 2 != 0 || s.block_size % kPageTokens != 0 ||
      int64_t{s.num_heads} * s.head_dim > KVF_MAX_WIDTH) {
    return KVF_E_SHAPE;
  }
  return check_rank(s);
}

}  // namespace kvferry
