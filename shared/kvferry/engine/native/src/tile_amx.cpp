// Micro-kernels on tile registers: 16 rows of x times the three tiles side by side in a step of a panel, or 32 rows.
#include "tile.h"

#if defined(KVF_AMX)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace kvferry {
namespace {

static_assert(kPanelColumns == 3 * Isa::kLanes);
constexpr ptrdiff_t kStepBytes = ptrdiff_t{kPanelColumns} * 4;  // of two bf16 or four codes of every column
constexpr ptrdiff_t kSumBytes = ptrdiff_t{kPanelColumns} * 4;   // of a row of sums
constexpr int kTileValues = kTileRegisterBytes / static_cast<int>(sizeof(bf16));
static_assert(kTileValues == kDepth && kTileRegisterBytes == kGroup);

// Three registers of sums side by side, as wide as a panel.
template <int First>
void zero_sums() {
  tile_zero<First>(), tile_zero<First + 1>(), tile_zero<First + 2>();
}
template <int First, typename Sum>
void store_sums(Sum* out) {
  tile_store<First>(out, kSumBytes);
  tile_store<First + 1>(out + Isa::kLanes, kSumBytes);
  tile_store<First + 2>(out + 2 * Isa::kLanes, kSumBytes);
}

// Up to 16 rows: registers 0 to 2 are sums, 3 is x, 6 and 7 weights.
void one_block(const bf16* panel, int steps, const bf16* x, ptrdiff_t x_bytes, float* out) {
  zero_sums<0>();
  const char* weights = reinterpret_cast<const char*>(panel);
  for (int step = 0; step < steps; ++step, weights += kTileRegisterRows * kStepBytes, x += kTileValues) {
    tile_load<3>(x, x_bytes);
    tile_load<6>(weights, kStepBytes);
    tile_dot_bf16<0, 3, 6>();
    tile_load<7>(weights + kTileRegisterBytes, kStepBytes);
    tile_dot_bf16<1, 3, 7>();
    tile_load<6>(weights + 2 * kTileRegisterBytes, kStepBytes);
    tile_dot_bf16<2, 3, 6>();
  }
  store_sums<0>(out);
}

// 32 rows: registers 0 to 5 are sums, 6 is x, 7 weights.
void two_blocks(const bf16* panel, int steps, const bf16* x, ptrdiff_t x_bytes, float* out) {
  zero_sums<0>(), zero_sums<3>();
  const char* weights = reinterpret_cast<const char*>(panel);
  const bf16* below = x + kTileRegisterRows * (x_bytes / static_cast<ptrdiff_t>(sizeof(bf16)));
  for (int step = 0; step < steps; ++step, weights += kTileRegisterRows * kStepBytes) {
    const bf16 *upper = x + step * kTileValues, *lower = below + step * kTileValues;
    tile_load<7>(weights, kStepBytes);
    tile_load<6>(upper, x_bytes);
    tile_dot_bf16<0, 6, 7>();
    tile_load<6>(lower, x_bytes);
    tile_dot_bf16<3, 6, 7>();
    tile_load<7>(weights + kTileRegisterBytes, kStepBytes);
    tile_dot_bf16<4, 6, 7>();
    tile_load<6>(upper, x_bytes);
    tile_dot_bf16<1, 6, 7>();
    tile_load<7>(weights + 2 * kTileRegisterBytes, kStepBytes);
    tile_dot_bf16<2, 6, 7>();
    tile_load<6>(lower, x_bytes);
    tile_dot_bf16<5, 6, 7>();
  }
  store_sums<0>(out);
  store_sums<3>(out + kTileRegisterRows * kPanelColumns);
}

// The sums of a group, scaled by row and column, onto `out`.
void add_group(int rows, const int32_t* sums, const bf16* scales, const Int8Rows& x, int group, int groups,
               float* out) {
  Isa::F scale[Isa::kPanelVectors];
  for (int v = 0; v < Isa::kPanelVectors; ++v) scale[v] = Isa::load_bf16(scales + v * Isa::kLanes);
  for (int row = 0; row < rows; ++row, sums += kPanelColumns, out += kPanelColumns) {
    const ptrdiff_t of_row = static_cast<ptrdiff_t>(row) * groups + group;
    const Isa::I offset = Isa::set1_int(x.offsets[of_row]);
    const Isa::F row_scale = Isa::set1(x.scales[of_row]);
    for (int v = 0; v < Isa::kPanelVectors; ++v) {
      const Isa::I sum = Isa::add_int(Isa::load_bytes(sums + v * Isa::kLanes), offset);
      float* to = out + v * Isa::kLanes;
      Isa::store(to, Isa::fma(Isa::mul(Isa::to_float(sum), row_scale), scale[v], Isa::load(to)));
    }
  }
}

}  // namespace

void tile_bf16(TileRegisters& registers, int rows, const bf16* panel, int pairs, const bf16* x, ptrdiff_t ldx,
               float* out) {
  const ptrdiff_t x_bytes = ldx * static_cast<ptrdiff_t>(sizeof(bf16));
  const int steps = 2 * pairs / kDepth;
  if (rows == 2 * kTileRegisterRows) {
    registers.shape(TileUse::Product, kTileRegisterRows);
    two_blocks(panel, steps, x, x_bytes, out);
    return;
  }
  for (int row = 0; row < rows; row += kTileRegisterRows) {
    registers.shape(TileUse::Product, std::min(rows - row, kTileRegisterRows));
    one_block(panel, steps, x + row * ldx, x_bytes, out + row * kPanelColumns);
  }
}

// Registers 0 to 2 are sums, 3 is x, 6 and 7 weights.
void tile_int8(TileRegisters& registers, int rows, const std::byte* panel, int groups, Int8Rows x, float* out) {
  registers.shape(TileUse::Product, rows);
  std::fill_n(out, rows * kPanelColumns, 0.0f);
  const ptrdiff_t x_bytes = static_cast<ptrdiff_t>(groups) * kGroup;
  for (int group = 0; group < groups; ++group, panel += kGroupBytes) {
    const std::byte* codes = panel + kPanelColumns * sizeof(bf16);
    alignas(64) int32_t sums[kTileRowsInt8 * kPanelColumns];
    zero_sums<0>();
    tile_load<3>(x.codes + static_cast<ptrdiff_t>(group) * kGroup, x_bytes);
    tile_load<6>(codes, kStepBytes);
    tile_dot_int8<0, 3, 6>();
    tile_load<7>(codes + kTileRegisterBytes, kStepBytes);
    tile_dot_int8<1, 3, 7>();
    tile_load<6>(codes + 2 * kTileRegisterBytes, kStepBytes);
    tile_dot_int8<2, 3, 6>();
    store_sums<0>(sums);
    add_group(rows, sums, reinterpret_cast<const bf16*>(panel), x, group, groups, out);
  }
}

// Linux gives a process the state of tile registers on demand, and then to all of its threads: Documentation/arch/x86/
// xstate.rst.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace kvferry

#endif
