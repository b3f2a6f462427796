// The ranks of a split model: where they wait for each other, and the memory through which they exchange rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"
#include "shape.h"

namespace kvferry {

class Group {
 public:
  // Rows of logits that are shared at once.
  static constexpr int kLogitRows = 64;

  Group() = default;  // of a model that is whole: nobody to wait for
  // `memory`: bytes(shape), aligned to 64, zero before the first rank came.
  Group(const Shape& shape, std::byte* memory);
  // Of ranks that exchange elsewhere. `state`: KVF_BARRIER_BYTES, as above.
  Group(int ranks, std::byte* state);

  static uint64_t bytes(const Shape& shape);

  bool joined() const { return state_ != nullptr; }

  // Returns when all ranks have called it; what they wrote before is then visible to all. One thread of a rank calls it.
  void barrier();

  // Memory of max_rows rows, each row_stride(width) values apart.
  bf16* hidden = nullptr;
  bf16* mixed = nullptr;
  bf16* activated = nullptr;
  float* logits = nullptr;  // [kLogitRows, vocab_size]

 private:
  struct State;
  State* state_ = nullptr;
  uint32_t ranks_ = 1;
};

}  // namespace kvferry
