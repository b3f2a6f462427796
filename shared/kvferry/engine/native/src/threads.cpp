#include "threads.h"

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace kvferry {
namespace {

// A barrier's partner is usually a few microseconds late. If it is later, its core does something else: sleep, so that
// what runs there can end sooner.
constexpr std::chrono::microseconds kSpin{30};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Sequentially consistent on both sides: either the sleeper sees the new value before it sleeps, or the one who
// advances sees the sleeper.
void Epoch::advance() {
  value_.fetch_add(1);
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper between its check and its wait holds this
  advanced_.notify_all();
}

void Epoch::wait_past(uint32_t seen) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (now() != seen) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  advanced_.wait(lock, [&] { return value_.load() != seen; });
  sleepers_.fetch_sub(1);
}

Threads::Threads(int count) : count_(count) {
  for (int thread = 0; thread < count; ++thread) scratch_.push_back(make_aligned<std::byte>(kScratchBytes));
  for (int thread = 1; thread < count; ++thread) threads_.emplace_back(&Threads::work, this, thread);
}

Threads::~Threads() {
  function_ = nullptr;
  started_.advance();
  for (std::thread& thread : threads_) thread.join();
}

void Threads::run(Function function, void* context) {
  if (count_ > 1) {
    function_ = function;
    context_ = context;
    started_.advance();
  }
  function(context, 0);
  barrier(0);
}

void Threads::work(int thread) {
  for (uint32_t runs = 0;; ++runs) {
    started_.wait_past(runs);
    if (function_ == nullptr) return;
    function_(context_, thread);
    barrier(thread);
  }
}

void Threads::barrier(int) {
  if (count_ == 1) return;
  // Read before arriving: the last to arrive advances it.
  const uint32_t seen = passed_.now();
  if (arrived_.fetch_add(1) + 1 == count_) {
    arrived_.store(0);
    passed_.advance();
  } else {
    passed_.wait_past(seen);
  }
}

}  // namespace kvferry
