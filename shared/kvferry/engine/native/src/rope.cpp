#include "rope.h"

#include <algorithm>

#include "isa.h"

namespace kvferry {

RopeTable::RopeTable(const float* cos, const float* sin, int length, int half)
    : half_(half),
      cos_(static_cast<size_t>(length) * static_cast<size_t>(half)),
      sin_(static_cast<size_t>(length) * static_cast<size_t>(half)) {
  std::transform(cos, cos + cos_.size(), cos_.begin(), to_bf16);
  std::transform(sin, sin + sin_.size(), sin_.begin(), to_bf16);
}

void RopeTable::rotate(bf16* head, int position) const {
  using F = Isa::F;
  const size_t row = static_cast<size_t>(position) * static_cast<size_t>(half_);
  const bf16* cos = cos_.data() + row;
  const bf16* sin = sin_.data() + row;
  bf16* low = head;
  bf16* high = head + half_;
  for (int i = 0; i < half_; i += Isa::kLanes) {
    const int n = std::min(half_ - i, Isa::kLanes);
    const F c = Isa::load_bf16_n(cos + i, n), s = Isa::load_bf16_n(sin + i, n);
    const F a = Isa::load_bf16_n(low + i, n), b = Isa::load_bf16_n(high + i, n);
    const F first = Isa::sub(Isa::round_bf16(Isa::mul(a, c)), Isa::round_bf16(Isa::mul(b, s)));
    const F second = Isa::add(Isa::round_bf16(Isa::mul(b, c)), Isa::round_bf16(Isa::mul(a, s)));
    Isa::store_bf16_n(low + i, first, n);
    Isa::store_bf16_n(high + i, second, n);
  }
}

}  // namespace kvferry
