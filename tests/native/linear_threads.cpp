#if defined(__linux__)
#include <sched.h>
#endif
#include <time.h>

#include <chrono>

#include "linear_check.h"

namespace linear_test {
namespace {

void split_covers_everything_once() {
  for (int count : {0, 1, 5, 12, 1024}) {
    for (int parts = 1; parts <= 7; ++parts) {
      int next = 0;
      for (int part = 0; part < parts; ++part) {
        const Range range = split(count, parts, part);
        CHECK(range.begin == next && range.size() >= count / parts && range.size() <= count / parts + 1, "split");
        next = range.end;
      }
      CHECK(next == count, "split");
    }
  }
}

// Each stage reads what all threads wrote in the stage before; plain ints, so that a missing barrier is a data race.
void a_barrier_parts_the_stages(int count) {
  Threads threads(count);
  std::vector<int> cells(count, 0);
  const int stages = small ? 50 : 250;
  for (int run = 0; run < 3; ++run) {
    threads.run([&](int thread) {
      for (int stage = 0; stage < stages; ++stage) {
        // Now and then one is late by more than the others spin.
        if (stage % 25 == 3 && thread == stage % count) std::this_thread::sleep_for(std::chrono::microseconds(200));
        const int seen = cells[(thread + 1) % count];
        CHECK(seen == run * stages + stage, "thread %d saw %d in stage %d", thread, seen, stage);
        threads.barrier(thread);
        ++cells[thread];
        threads.barrier(thread);
      }
    });
  }
  for (int cell : cells) CHECK(cell == 3 * stages, "a run returned before its threads");
}

void idle_threads_sleep() {
  Threads threads(4);
  threads.run([](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const clock_t start = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  const double used = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  CHECK(used < 0.03, "%g s of CPU in 0.3 s of idleness", used);
}

// The others' work is on the same core: whoever spins for it keeps it from being done. A barrier that spun until it is
// passed would cost a time slice, some milliseconds, each time.
void waiting_leaves_the_core_to_others() {
#if defined(__linux__)
  cpu_set_t before, one;
  CHECK(sched_getaffinity(0, sizeof before, &before) == 0, "affinity");
  int core = 0;
  while (!CPU_ISSET(core, &before)) ++core;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  CHECK(sched_setaffinity(0, sizeof one, &one) == 0, "affinity");
  {
    Threads threads(3);
    constexpr int kBarriers = 400;
    const clock_t start = std::clock();
    threads.run([&](int thread) {
      for (int i = 0; i < kBarriers; ++i) threads.barrier(thread);
    });
    const double each = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC / kBarriers;
    CHECK(each < 1e-3, "%g s of CPU for a barrier of three threads on one core", each);
  }
  CHECK(sched_setaffinity(0, sizeof before, &before) == 0, "affinity");
#endif
}

}  // namespace

void test_threads() {
  split_covers_everything_once();
  for (int count = 1; count <= 4; ++count) a_barrier_parts_the_stages(count);
  idle_threads_sleep();
  waiting_leaves_the_core_to_others();
  for (int i = 0; i < 20; ++i) Threads unused(3);
}

}  // namespace linear_test
