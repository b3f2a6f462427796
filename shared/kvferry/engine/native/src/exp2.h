// 2^x over whole vectors, for the softmax: cheaper than exp by the multiplications that split off powers of e.
#pragma once

#include "isa.h"

namespace kvferry {

// Relative error below 3e-7 for x <= 1; 2^0 is 1. Below -126 it is 2^-126: never 0 or subnormal. A NaN's result is any
// number.
inline Isa::F exp2(Isa::F x) {
  using F = Isa::F;
  x = Isa::max(x, Isa::set1(-126.0f));
  // Adding 1.5 * 2^23 rounds to a whole number.
  const F shift = Isa::set1(12582912.0f);
  const F n = Isa::sub(Isa::add(x, shift), shift);
  const F r = Isa::sub(x, n);  // exact, within [-0.5, 0.5]
  // Least largest relative error of 1 + r q(r), q of degree 4.
  F p = Isa::set1(1.326472779e-03f);
  p = Isa::fma(p, r, Isa::set1(9.671512997e-03f));
  p = Isa::fma(p, r, Isa::set1(5.550733744e-02f));
  p = Isa::fma(p, r, Isa::set1(2.402224208e-01f));
  p = Isa::fma(p, r, Isa::set1(6.931469776e-01f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  return Isa::mul(p, Isa::power_of_two(n));
}

}  // namespace kvferry
