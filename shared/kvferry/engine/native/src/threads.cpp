#include "threads.h"

#include "pause.h"

namespace kvferry {

// Sequentially consistent on both sides: either the sleeper sees the new value before it sleeps, or the one who
// advances sees the sleeper.
void Epoch::advance() {
  value_.fetch_add(1);
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper between its check and its wait holds this
  advanced_.notify_all();
}

void Epoch::wait_past(uint32_t seen) {
  if (spin([&] { return now() != seen; })) return;
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

bool Threads::arrive() { return arrived_.fetch_add(1) + 1 == count_; }

void Threads::let_pass() {
  arrived_.store(0);
  passed_.advance();
}

}  // namespace kvferry
