// Shuffles of whole vectors through the compiler's vector extension: one or two instructions each on every processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"

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

// kWords x kWords, in place. Each pass moves the top bit of the row number into the column number and back.
inline void transpose(Words (&rows)[kWords]) {
  for (int pass = 1; pass < kWords; pass *= 2) {
    Words mixed[kWords];
    for (int i = 0; i < kWords / 2; ++i) {
      mixed[2 * i] = zip_low(rows[i], rows[i + kWords / 2]);
      mixed[2 * i + 1] = zip_high(rows[i], rows[i + kWords / 2]);
    }
    for (int i = 0; i < kWords; ++i) rows[i] = mixed[i];
  }
}

}  // namespace kvferry
