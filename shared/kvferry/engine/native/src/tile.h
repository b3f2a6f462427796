// Micro-kernels: a few rows of x times one panel of weights, all of k in one go.
//
// Every output is one chain over k in ascending order (on tile registers: as tile_dot_bf16 has it), the same for every
// number of rows: rows and vectors of a tile are template parameters of one loop.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"
#include "pack.h"

namespace kvferry {

// Rows of the largest tile.
constexpr int kTileRows = Isa::kTiles ? 32 : Isa::kMaxRows;
constexpr int kTileRowsInt8 = Isa::kTiles ? 16 : Isa::kMaxRowsInt8;

// Whether this process may multiply here: where tile registers are needed, asks the kernel, once for all threads.
bool may_use_tiles();

// out [rows, kPanelColumns] fp32 = x [rows, 2 * pairs] (row stride ldx) times a bf16 panel. 1 <= rows <= kTileRows,
// 2 * pairs is a multiple of kDepth.
void tile_bf16(TileRegisters& registers, int rows, const bf16* panel, int pairs, const bf16* x, ptrdiff_t ldx, float* out);

// Quantised rows, as quantize_row makes them.
struct Int8Rows {
  const int8_t* codes;     // [rows, groups * kGroup]
  const float* scales;     // [rows, groups]
  const int32_t* offsets;  // [rows, groups]
};

// out [rows, kPanelColumns] fp32 = x times an int8 panel: exact integer sums within each group, then one fp32 chain
// over the groups. 1 <= rows <= kTileRowsInt8.
void tile_int8(TileRegisters& registers, int rows, const std::byte* panel, int groups, Int8Rows x, float* out);

}  // namespace kvferry
