// Where a step's time goes, measured by thread 0 when asked for.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <utility>

#include "kvferry.h"

namespace kvferry {

class Stages {
 public:
  bool enabled = false;

  void begin() {
    if (enabled) last_ = Clock::now();
  }
  // The time since the last end belongs to `stage`.
  void end(int stage) {
    if (!enabled) return;
    const Clock::time_point now = Clock::now();
    seconds_[static_cast<size_t>(stage)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  // The seconds since the last call.
  std::array<double, KVF_NUM_STAGES> take() { return std::exchange(seconds_, {}); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_;
  std::array<double, KVF_NUM_STAGES> seconds_{};
};

}  // namespace kvferry
