#include "peaks.h"

#include <time.h>

#include "isa.h"
#include "prefetch.h"

namespace kvferry {
namespace {

using F = Isa::F;
using P = Isa::P;
using I = Isa::I;

// Enough chains to hide the latency, as many as a tile of vectors has.
[[maybe_unused]] constexpr int kChains = Isa::kMaxRows * Isa::tile_vectors(Isa::kMaxRows);
constexpr int kRepeats = 1 << 14;

// Time on a core, not on the wall: a limit is not lower because other processes run.
double thread_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Results that a compiler must believe are used.
volatile float sink;

// Returns the floating-point operations done.
#if defined(KVF_AMX)
double multiply_add() {
  TileRegisters registers;
  registers.shape(TileUse::Product, kTileRegisterRows);
  for (int i = 0; i < kRepeats; ++i) {
    tile_dot_bf16<0, 6, 7>(), tile_dot_bf16<1, 6, 7>(), tile_dot_bf16<2, 6, 7>();
    tile_dot_bf16<3, 6, 7>(), tile_dot_bf16<4, 6, 7>(), tile_dot_bf16<5, 6, 7>();
  }
  return double{kRepeats} * 6 * kTileRegisterRows * kTileRegisterBytes * Isa::kLanes;
}
#else
double multiply_add() {
  const bf16 pair[2] = {to_bf16(0.5f), to_bf16(0.25f)};
  const P a = Isa::broadcast_pair(pair);
  const F low = Isa::low(a);
  F acc[kChains];
  for (F& chain : acc) chain = low;
  for (int i = 0; i < kRepeats; ++i) {
    for (F& chain : acc) {
      if constexpr (Isa::kDotsPairs) {
        chain = Isa::dot2(chain, a, a);
      } else {
        chain = Isa::fma(low, low, chain);
      }
    }
  }
  F sum = Isa::zero();
  for (const F& chain : acc) sum = Isa::add(sum, chain);
  sink = Isa::hsum(sum);
  return double{kRepeats} * kChains * Isa::kLanes * (Isa::kDotsPairs ? 4 : 2);
}
#endif

}  // namespace
}  // namespace kvferry

double kvf_peak_dot(double seconds) {
  const double start = kvferry::thread_seconds();
  double operations = 0, elapsed = 0;
  do {
    operations += kvferry::multiply_add();
    elapsed = kvferry::thread_seconds() - start;
  } while (elapsed < seconds);
  return operations / elapsed;
}

double kvf_peak_read(const void* memory, uint64_t bytes) {
  using namespace kvferry;
  constexpr int kVectors = 8;
  constexpr uint64_t kStep = sizeof(I) * kVectors;
  constexpr Ahead kAhead = Isa::ahead(1);  // as one row reads its weights
  const char* from = static_cast<const char*>(memory);
  const double start = thread_seconds();
  F sum[kVectors];
  for (F& s : sum) s = Isa::zero();
  for (uint64_t at = 0; at + kStep <= bytes; at += kStep) {
    for (int v = 0; v < kVectors; ++v) {
      const char* vector = from + at + sizeof(I) * v;
      if constexpr (kAhead.bytes > 0) prefetch<kAhead.cache>(vector + kAhead.bytes);
      sum[v] = Isa::max(sum[v], Isa::low(Isa::load_pairs(reinterpret_cast<const bf16*>(vector))));
    }
  }
  for (int v = 1; v < kVectors; ++v) sum[0] = Isa::max(sum[0], sum[v]);
  sink = Isa::hmax(sum[0]);
  return static_cast<double>(bytes) / (thread_seconds() - start);
}
