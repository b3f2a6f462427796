#include "group.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "pause.h"
#include "workspace.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvferry {

// Shared by processes: nothing in it is a pointer or belongs to one of them.
struct Group::State {
  alignas(64) std::atomic<uint32_t> arrived;
  alignas(64) std::atomic<uint32_t> passed;
  alignas(64) std::atomic<uint32_t> sleepers;
};

namespace {

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t rows_bytes(const Shape& shape, int width) {
  return static_cast<size_t>(shape.max_rows) * static_cast<size_t>(row_stride(width)) * sizeof(bf16);
}

// Sleeps while `word` is `seen`, at most until someone wakes it; may wake for nothing.
void sleep_on(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, nullptr, nullptr, 0);
#else
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  (void)word, (void)seen;
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, KVF_MAX_RANKS, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

Group::Group(int ranks, std::byte* state)
    : state_(reinterpret_cast<State*>(state)), ranks_(static_cast<uint32_t>(ranks)) {
  static_assert(sizeof(State) <= KVF_BARRIER_BYTES && std::atomic<uint32_t>::is_always_lock_free &&
                sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
}

Group::Group(const Shape& shape, std::byte* memory) : Group(shape.ranks, memory) {
  std::byte* next = memory + KVF_BARRIER_BYTES;
  const auto take = [&](int width) {
    bf16* taken = reinterpret_cast<bf16*>(next);
    next += aligned(rows_bytes(shape, width));
    return taken;
  };
  hidden = take(shape.hidden_size);
  mixed = take(shape.query_size());
  activated = take(shape.intermediate_size);
  logits = reinterpret_cast<float*>(next);
}

uint64_t Group::bytes(const Shape& shape) {
  if (!shape.split()) return 0;
  uint64_t total = KVF_BARRIER_BYTES + uint64_t{kLogitRows} * static_cast<uint64_t>(shape.vocab_size) * sizeof(float);
  for (const int width : {shape.hidden_size, shape.query_size(), shape.intermediate_size}) {
    total += aligned(rows_bytes(shape, width));
  }
  return total;
}

// Sequentially consistent, as in Epoch: either a sleeper sees the new value, or who advances sees the sleeper.
void Group::barrier() {
#ifdef KVF_SKIP_BARRIER
  return;  // negative control of the tests for races, in no other build
#endif
  if (state_ == nullptr) return;
  const uint32_t seen = state_->passed.load();  // before arriving: the last to arrive advances it
  if (state_->arrived.fetch_add(1) + 1 == ranks_) {
    state_->arrived.store(0);
    state_->passed.fetch_add(1);
    if (state_->sleepers.load() != 0) wake_all(state_->passed);
    return;
  }
  if (spin([&] { return state_->passed.load(std::memory_order_acquire) != seen; })) return;
  state_->sleepers.fetch_add(1);
  while (state_->passed.load() == seen) sleep_on(state_->passed, seen);
  state_->sleepers.fetch_sub(1);
}

}  // namespace kvferry
