#include "batch.h"

#include <algorithm>

namespace kvferry {
namespace {

int32_t check_sequence(const Shape& shape, int num_blocks, const kvf_sequence& sequence) {
  if (sequence.num_rows == 0) return KVF_E_EMPTY;
  if (sequence.num_rows < 0 || sequence.tokens == nullptr || sequence.logits < KVF_NO_LOGITS ||
      sequence.logits > KVF_ALL_LOGITS) {
    return KVF_E_ARGUMENT;
  }
  const int64_t end = int64_t{sequence.start} + sequence.num_rows;
  if (sequence.start < 0 || end > shape.max_len) return KVF_E_POSITION;
  const auto vocab_size = static_cast<uint32_t>(shape.vocab_size);
  if (std::any_of(sequence.tokens, sequence.tokens + sequence.num_rows,
                  [=](uint32_t token) { return token >= vocab_size; })) {
    return KVF_E_TOKEN;
  }
  return check_table(shape, num_blocks, sequence.block_table, sequence.num_blocks, 0, end);
}

}  // namespace

int32_t check_table(const Shape& shape, int num_blocks, const int32_t* block_table, int32_t count, int64_t begin,
                    int64_t end) {
  if (block_table == nullptr || count < 0) return KVF_E_ARGUMENT;
  if (end > int64_t{count} * shape.block_size) return KVF_E_POSITION;
  const int64_t first = begin / shape.block_size, last = (end + shape.block_size - 1) / shape.block_size;
  const bool inside = std::all_of(block_table + first, block_table + last,
                                  [=](int32_t block) { return block >= 0 && block < num_blocks; });
  return inside ? KVF_OK : KVF_E_BLOCK;
}

int32_t make_batch(const Shape& shape, int num_blocks, const kvf_sequence* sequences, int32_t count, Batch& batch) {
  batch.tokens.clear();
  batch.positions.clear();
  batch.segments.clear();
  batch.drawing.clear();
  batch.wanted.clear();
  if (count < 0 || count > KVF_MAX_SEQUENCES || (count > 0 && sequences == nullptr)) return KVF_E_ARGUMENT;
  int64_t rows = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (const int32_t error = check_sequence(shape, num_blocks, sequences[i]); error != KVF_OK) return error;
    rows += sequences[i].num_rows;
    if (rows > KVF_MAX_STEP_ROWS) return KVF_E_ARGUMENT;
  }
  for (int32_t i = 0; i < count; ++i) {
    const kvf_sequence& sequence = sequences[i];
    const int first = batch.rows();
    batch.segments.push_back({sequence.block_table, sequence.start, sequence.num_rows, first, first});
    batch.tokens.insert(batch.tokens.end(), sequence.tokens, sequence.tokens + sequence.num_rows);
    for (int32_t row = 0; row < sequence.num_rows; ++row) batch.positions.push_back(sequence.start + row);
    if (sequence.logits == KVF_NO_LOGITS) continue;
    const int drawn = sequence.logits == KVF_LAST_LOGITS ? 1 : sequence.num_rows;
    const int skipped = sequence.num_rows - drawn;
    batch.drawing.push_back({sequence.block_table, sequence.start + skipped, drawn, first + skipped,
                             static_cast<int>(batch.wanted.size())});
    for (int row = skipped; row < sequence.num_rows; ++row) batch.wanted.push_back(first + row);
  }
  return KVF_OK;
}

}  // namespace kvferry
