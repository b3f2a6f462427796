// Rotary position embedding at Hugging Face's rounding points: both products rounded to bf16, then their sum.
#pragma once

#include <vector>

#include "bf16.h"

namespace kvferry {

// cos and sin for every position; made by Python, in bf16.
class RopeTable {
 public:
  // `cos`, `sin` [length, half], half = head_dim / 2. Throws std::bad_alloc.
  RopeTable(const float* cos, const float* sin, int length, int half);

  // One head at `position`, in place: dimensions i and i + half turn together.
  void rotate(bf16* head, int position) const;

 private:
  int half_;
  std::vector<bf16> cos_, sin_;  // [length][half]
};

}  // namespace kvferry
