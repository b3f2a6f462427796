// Functions over whole vectors, written once: the same operations in the same order for every instruction set.
#pragma once

#include "isa.h"

namespace kvferry {

// e^x, relative error below 2e-7; below -87 it is e^-87 (1.6e-38), above 88 it is e^88: never 0, infinity or subnormal.
// A NaN's result is any number.
inline Isa::F exp(Isa::F x) {
  using F = Isa::F;
  x = Isa::min(Isa::max(x, Isa::set1(-87.0f)), Isa::set1(88.0f));
  // Adding 1.5 * 2^23 rounds to a whole number.
  const F shift = Isa::set1(12582912.0f);
  const F n = Isa::sub(Isa::fma(x, Isa::set1(1.44269504088896341f), shift), shift);
  // ln 2 in two parts, the first exact in n * part.
  F r = Isa::fma(n, Isa::set1(-0.693359375f), x);
  r = Isa::fma(n, Isa::set1(2.12194440e-4f), r);
  F p = Isa::set1(1.0f / 5040);
  p = Isa::fma(p, r, Isa::set1(1.0f / 720));
  p = Isa::fma(p, r, Isa::set1(1.0f / 120));
  p = Isa::fma(p, r, Isa::set1(1.0f / 24));
  p = Isa::fma(p, r, Isa::set1(1.0f / 6));
  p = Isa::fma(p, r, Isa::set1(0.5f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  return Isa::mul(p, Isa::power_of_two(n));
}

}  // namespace kvferry
