// Loops that the compiler sees unrolled from the start, so that arrays of vectors become registers.
#pragma once

#include <utility>

namespace kvferry {

template <typename Body, int... Index>
[[gnu::always_inline]] inline void unroll(Body&& body, std::integer_sequence<int, Index...>) {
  (body(std::integral_constant<int, Index>{}), ...);
}

// body(0), ..., body(Count - 1), each index a constant expression.
template <int Count, typename Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
  unroll(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace kvferry
