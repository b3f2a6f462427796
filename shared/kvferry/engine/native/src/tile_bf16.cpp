#if !defined(KVF_AMX)  // see tile_amx.cpp

#include <array>
#include <utility>

#include "prefetch.h"
#include "tile.h"
#include "unroll.h"

namespace kvferry {
namespace {

using F = Isa::F;
using P = Isa::P;

constexpr int kStep = 2 * kPanelColumns;  // bf16 of a panel per pair of k
constexpr int kLine = 64 / static_cast<int>(sizeof(bf16));

// Of a step's weights further on, over the end into the next panel.
template <int Rows, int Vectors>
inline void ask_ahead(const bf16* weights) {
  constexpr Ahead kAhead = Isa::ahead(Rows);
  if constexpr (kAhead.bytes > 0) {
    const bf16* from = weights + kAhead.bytes / static_cast<int>(sizeof(bf16));
    for (int i = 0; i < 2 * Isa::kLanes * Vectors; i += kLine) prefetch<kAhead.cache>(from + i);
  }
}

template <int Rows, int Vectors>
inline void accumulate(F (&acc)[Rows][Vectors], const bf16* weights, const bf16* x, ptrdiff_t ldx) {
  constexpr int kPairsOfVector = 2 * Isa::kLanes;
  if constexpr (Isa::kDotsPairs) {
    P w[Vectors];
    unroll<Vectors>([&](auto v) { w[v] = Isa::load_pairs(weights + v * kPairsOfVector); });
    unroll<Rows>([&](auto r) {
      const P pair = Isa::broadcast_pair(x + r * ldx);
      unroll<Vectors>([&](auto v) { acc[r][v] = Isa::dot2(acc[r][v], w[v], pair); });
    });
  } else {
    // All low products, then all high ones: the order of dot2 in each chain, with half the weights in registers.
    F w[Vectors];
    unroll<Vectors>([&](auto v) { w[v] = Isa::low(Isa::load_pairs(weights + v * kPairsOfVector)); });
    unroll<Rows>([&](auto r) {
      const F value = Isa::low(Isa::broadcast_pair(x + r * ldx));
      unroll<Vectors>([&](auto v) { acc[r][v] = Isa::fma(w[v], value, acc[r][v]); });
    });
    asm volatile("" ::: "memory");  // load again: what stays in registers over both passes pushes out accumulators
    unroll<Vectors>([&](auto v) { w[v] = Isa::high(Isa::load_pairs(weights + v * kPairsOfVector)); });
    unroll<Rows>([&](auto r) {
      const F value = Isa::high(Isa::broadcast_pair(x + r * ldx));
      unroll<Vectors>([&](auto v) { acc[r][v] = Isa::fma(w[v], value, acc[r][v]); });
    });
  }
}

template <int Rows>
void tile(const bf16* panel, int pairs, const bf16* x, ptrdiff_t ldx, float* out) {
  constexpr int kVectors = Isa::tile_vectors(Rows);
  for (int first = 0; first < Isa::kPanelVectors; first += kVectors) {
    const bf16* weights = panel + first * 2 * Isa::kLanes;
    F acc[Rows][kVectors];
    unroll<Rows>([&](auto r) { unroll<kVectors>([&](auto v) { acc[r][v] = Isa::zero(); }); });
    for (int pair = 0; pair < pairs; ++pair, weights += kStep) {
      ask_ahead<Rows, kVectors>(weights);
      accumulate<Rows, kVectors>(acc, weights, x + 2 * pair, ldx);
    }
    unroll<Rows>([&](auto r) {
      unroll<kVectors>([&](auto v) { Isa::store(out + r * kPanelColumns + (first + v) * Isa::kLanes, acc[r][v]); });
    });
  }
}

using Function = void (*)(const bf16*, int, const bf16*, ptrdiff_t, float*);

template <int... Index>
constexpr std::array<Function, sizeof...(Index)> instances(std::integer_sequence<int, Index...>) {
  return {tile<Index + 1>...};
}

}  // namespace

void tile_bf16(TileRegisters&, int rows, const bf16* panel, int pairs, const bf16* x, ptrdiff_t ldx, float* out) {
  static constexpr auto kTiles = instances(std::make_integer_sequence<int, kTileRows>{});
  kTiles[static_cast<size_t>(rows - 1)](panel, pairs, x, ldx, out);
}

bool may_use_tiles() { return true; }

}  // namespace kvferry

#endif
