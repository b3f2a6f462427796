// Waiting for what is about to happen: a short spin. If it takes longer, the partner's core does something else: sleep,
// so that what runs there can end sooner.
#pragma once

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace kvferry {

constexpr std::chrono::microseconds kSpin{30};  // a barrier's partner is usually a few microseconds late

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `done` came true within kSpin.
template <typename Done>
bool spin(Done&& done) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace kvferry
