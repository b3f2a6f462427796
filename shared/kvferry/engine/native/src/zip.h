// Shuffles of whole vectors through the compiler's vector extension: one or two instructions each on every processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"
#include "unroll.h"

namespace kvferry {

// One register each, as wide as the build's own.
using Words = uint32_t __attribute__((vector_size(4 * Isa::kLanes)));
using Halves = uint16_t __attribute__((vector_size(4 * Isa::kLanes)));
constexpr int kWords = Isa::kLanes;
constexpr int kHalves = 2 * Isa::kLanes;

template <typename V>
constexpr int kElements = static_cast<int>(sizeof(V) / sizeof(std::declval<V>()[0]));

template <typename V>
V read_vector(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
// The first `bytes` alone, the rest zero.
template <typename V>
V read_part(const void* from, size_t bytes) {
  V value{};
  std::memcpy(&value, from, bytes);
  return value;
}

namespace detail {

template <int... Index, typename V>
V pick(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index...);
#else
  return __builtin_shuffle(a, b, V{Index...});
#endif
}
template <int First, typename V, int... I>
V zip(V a, V b, std::integer_sequence<int, I...>) {
  return pick<(First + I / 2 + I % 2 * kElements<V>)...>(a, b);
}
template <int First, typename V, int... I>
V unzip(V a, V b, std::integer_sequence<int, I...>) {
  return pick<(First + 2 * I)...>(a, b);
}

}  // namespace detail

// a0 b0 a1 b1 ... of the lower, the upper halves of a and b.
template <typename V>
V zip_low(V a, V b) {
  return detail::zip<0>(a, b, std::make_integer_sequence<int, kElements<V>>{});
}
template <typename V>
V zip_high(V a, V b) {
  return detail::zip<kElements<V> / 2>(a, b, std::make_integer_sequence<int, kElements<V>>{});
}
// The even, the odd elements of a, then of b.
template <typename V>
V unzip_even(V a, V b) {
  return detail::unzip<0>(a, b, std::make_integer_sequence<int, kElements<V>>{});
}
template <typename V>
V unzip_odd(V a, V b) {
  return detail::unzip<1>(a, b, std::make_integer_sequence<int, kElements<V>>{});
}

namespace detail {

// Of rows whose numbers differ in `Bit` alone: exchanges the elements whose columns have it in one and not the other.
template <int Bit, typename V, int... I>
[[gnu::always_inline]] inline void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  const V low = pick<((I & Bit) != 0 ? kElements<V> + I - Bit : I)...>(a, b);
  b = pick<((I & Bit) != 0 ? kElements<V> + I : I + Bit)...>(a, b);
  a = low;
}

template <int Bit>
[[gnu::always_inline]] inline void exchange_all(Words (&rows)[kWords]) {
  unroll<kWords / 2>([&](auto pair) {
    constexpr int row = pair / Bit * 2 * Bit + pair % Bit;
    exchange<Bit>(rows[row], rows[row + Bit], std::make_integer_sequence<int, kWords>{});
  });
  if constexpr (Bit > 1) exchange_all<Bit / 2>(rows);
}

}  // namespace detail

// kWords x kWords, in place: a bit of the row number and the same of the column number change places, one after the
// other. Unrolled, because rows that are indexed at run time would lie on the stack.
[[gnu::always_inline]] inline void transpose(Words (&rows)[kWords]) { detail::exchange_all<kWords / 2>(rows); }

}  // namespace kvferry
