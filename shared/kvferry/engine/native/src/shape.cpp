#include "shape.h"

#include <cmath>

#include "pack.h"

namespace kvferry {
namespace {

// Queries, keys and values are three widths at most, gate and up two.
static_assert(kMaxK == KVF_MAX_WIDTH && kMaxN == KVF_MAX_DIMENSION && 3 * kMaxK <= kMaxN);

bool within(int32_t value, int64_t low, int64_t high) { return low <= value && value <= high; }
bool is_flag(int32_t value) { return value == 0 || value == 1; }

}  // namespace

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
  return KVF_OK;
}

}  // namespace kvferry
