#include "norm.h"

#include <cmath>

#include "isa.h"

namespace kvferry {

void rms_norm(const bf16* x, const bf16* weight, float eps, int size, bf16* y) {
  using F = Isa::F;
  constexpr int W = Isa::kLanes;
  const int whole = size / W * W, rest = size - whole;
  // Two chains hide the latency of the multiply-add; their order is fixed by the size alone.
  F even = Isa::zero(), odd = Isa::zero();
  int i = 0;
  for (; i + 2 * W <= size; i += 2 * W) {
    const F a = Isa::load_bf16(x + i), b = Isa::load_bf16(x + i + W);
    even = Isa::fma(a, a, even);
    odd = Isa::fma(b, b, odd);
  }
  if (i < whole) {
    const F a = Isa::load_bf16(x + i);
    even = Isa::fma(a, a, even);
  }
  if (rest != 0) {
    const F a = Isa::load_bf16_n(x + whole, rest);
    odd = Isa::fma(a, a, odd);
  }
  const float mean = Isa::hsum(Isa::add(even, odd)) / static_cast<float>(size);
  const F scale = Isa::set1(1.0f / std::sqrt(mean + eps));
  for (i = 0; i < whole; i += W) {
    const F scaled = Isa::round_bf16(Isa::mul(Isa::load_bf16(x + i), scale));
    Isa::store_bf16(y + i, Isa::mul(scaled, Isa::load_bf16(weight + i)));
  }
  if (rest != 0) {
    const F scaled = Isa::round_bf16(Isa::mul(Isa::load_bf16_n(x + whole, rest), scale));
    Isa::store_bf16_n(y + whole, Isa::mul(scaled, Isa::load_bf16_n(weight + whole, rest)), rest);
  }
}

}  // namespace kvferry
