#if !defined(KVF_AMX)  // see tile_amx.cpp

#include <array>
#include <utility>

#include "prefetch.h"
#include "tile.h"
#include "unroll.h"

namespace kvferry {
namespace {

using F = Isa::F;
using I = Isa::I;

constexpr int kStep = 4 * kPanelColumns;  // bytes of a panel per four k

// The group's integer sums of `Vectors` vectors from `codes` on, added to `out` with both scales.
template <int Rows, int Vectors>
inline void add_group(const std::byte* codes, const bf16* scales, const Int8Rows& x, int group, int groups,
                      float* out) {
  I acc[Rows][Vectors];
  unroll<Rows>([&](auto r) {
    const I offset = Isa::set1_int(x.offsets[r * groups + group]);
    unroll<Vectors>([&](auto v) { acc[r][v] = offset; });
  });
  const int8_t* inputs = x.codes + static_cast<ptrdiff_t>(group) * kGroup;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(groups) * kGroup;
  for (int k = 0; k < kGroup; k += 4, codes += kStep) {
    I w[Vectors];
    unroll<Vectors>([&](auto v) {
      w[v] = Isa::load_bytes(codes + v * 4 * Isa::kLanes);
      if constexpr (Isa::kAheadInt8.bytes > 0) {
        prefetch<Isa::kAheadInt8.cache>(codes + v * 4 * Isa::kLanes + Isa::kAheadInt8.bytes);
      }
    });
    unroll<Rows>([&](auto r) {
      const I four = Isa::broadcast_bytes(inputs + r * stride + k);
      unroll<Vectors>([&](auto v) { acc[r][v] = Isa::dot4(acc[r][v], w[v], four); });
    });
  }
  F scale[Vectors];
  unroll<Vectors>([&](auto v) { scale[v] = Isa::load_bf16(scales + v * Isa::kLanes); });
  unroll<Rows>([&](auto r) {
    const F row_scale = Isa::set1(x.scales[r * groups + group]);
    unroll<Vectors>([&](auto v) {
      float* sum = out + r * kPanelColumns + v * Isa::kLanes;
      Isa::store(sum, Isa::fma(Isa::mul(Isa::to_float(acc[r][v]), row_scale), scale[v], Isa::load(sum)));
    });
  });
}

template <int Rows>
void tile(const std::byte* panel, int groups, Int8Rows x, float* out) {
  constexpr int kVectors = Isa::tile_vectors(Rows);
  for (int i = 0; i < Rows * kPanelColumns; i += Isa::kLanes) Isa::store(out + i, Isa::zero());
  for (int group = 0; group < groups; ++group, panel += kGroupBytes) {
    const bf16* scales = reinterpret_cast<const bf16*>(panel);
    const std::byte* codes = panel + kPanelColumns * sizeof(bf16);
    for (int first = 0; first < Isa::kPanelVectors; first += kVectors) {
      add_group<Rows, kVectors>(codes + first * 4 * Isa::kLanes, scales + first * Isa::kLanes, x, group, groups,
                                out + first * Isa::kLanes);
    }
  }
}

using Function = void (*)(const std::byte*, int, Int8Rows, float*);

template <int... Index>
constexpr std::array<Function, sizeof...(Index)> instances(std::integer_sequence<int, Index...>) {
  return {tile<Index + 1>...};
}

}  // namespace

void tile_int8(TileRegisters&, int rows, const std::byte* panel, int groups, Int8Rows x, float* out) {
  static constexpr auto kTiles = instances(std::make_integer_sequence<int, kTileRowsInt8>{});
  kTiles[static_cast<size_t>(rows - 1)](panel, groups, x, out);
}

}  // namespace kvferry

#endif
