// The threads of one engine: every stage of a step runs on all of them, with barriers between the stages.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "aligned.h"

namespace kvferry {

// The part of `count` equal items that one of `parts` works on: contiguous, sizes differ by at most one.
struct Range {
  int begin, end;
  int size() const { return end - begin; }
};
inline Range split(int count, int parts, int part) {
  const auto edge = [&](int p) { return static_cast<int>(static_cast<int64_t>(count) * p / parts); };
  return {edge(part), edge(part + 1)};
}

// A number that only grows, and whose growth can be waited for: a short spin, then sleep.
class Epoch {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }
  // Everything that this thread wrote before is visible to those whom it wakes.
  void advance();
  void wait_past(uint32_t seen);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable advanced_;
};

// `count - 1` threads that sleep between runs; whoever calls `run` is thread 0. They inherit the creator's affinity.
// One run at a time. With a count of 1 there are no threads and `run` is a call.
class Threads {
 public:
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return count_; }

  // Calls task(thread) once on every thread, thread = 0 .. count - 1, and returns when all have returned. The task must
  // not throw.
  template <typename Task>
  void run(Task&& task) {
    using Plain = std::remove_reference_t<Task>;
    run([](void* context, int thread) { (*static_cast<Plain*>(context))(thread); },
        const_cast<void*>(static_cast<const void*>(&task)));
  }

  // Inside a run: returns when all threads have called it; what they wrote before is then visible to all. The last one
  // to come calls `last` before any of them goes on.
  void barrier(int thread) {
    barrier(thread, [] {});
  }
  template <typename Last>
  void barrier(int, Last&& last) {
    const uint32_t seen = passed_.now();  // before arriving: the last to arrive advances it
    if (count_ == 1) {
      last();
    } else if (arrive()) {
      last();
      let_pass();
    } else {
      passed_.wait_past(seen);
    }
  }

  // kScratchBytes of one thread, 64-byte aligned. `linear` uses it: its content does not outlive a stage.
  std::byte* scratch(int thread) { return scratch_[static_cast<size_t>(thread)].get(); }
  static constexpr size_t kScratchBytes = size_t{512} << 10;

 private:
  using Function = void (*)(void* context, int thread);

  void run(Function function, void* context);
  void work(int thread);
  bool arrive();  // whether this thread is the last
  void let_pass();

  const int count_;
  // What the next run does; written by thread 0 before `started_` advances. No function: the threads end.
  Function function_ = nullptr;
  void* context_ = nullptr;
  Epoch started_;
  std::atomic<int> arrived_{0};
  Epoch passed_;
  std::vector<Aligned<std::byte>> scratch_;
  std::vector<std::thread> threads_;
};

}  // namespace kvferry
