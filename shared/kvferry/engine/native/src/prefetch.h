// Memory asked for before it is read, a line at a time.
#pragma once

namespace kvferry {

// Into the first or the second cache. The first has too few outstanding misses to wait for memory.
template <int Cache>
[[gnu::always_inline]] inline void prefetch(const void* line) {
  static_assert(Cache == 1 || Cache == 2);
  __builtin_prefetch(line, 0, 4 - Cache);
}

// How far ahead of a stream it is asked for, and into which cache. No bytes: not at all.
struct Ahead {
  int bytes, cache;
};

}  // namespace kvferry
