// Micro-kernels: a few rows of x times one panel of weights, all of k in one go.
//
// Every output is one chain over k in ascending order, the same for every number of rows: rows and vectors of a tile
// are template parameters of one loop.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"
#include "pack.h"

namespace kvferry {

// out [rows, kPanelColumns] fp32 = x [rows, 2 * pairs] (row stride ldx) times a bf16 panel. 1 <= rows <= Isa::kMaxRows.
void tile_bf16(int rows, const bf16* panel, int pairs, const bf16* x, ptrdiff_t ldx, float* out);

// Quantised rows, as quantize_row makes them.
struct Int8Rows {
  const int8_t* codes;     // [rows, groups * kGroup]
  const float* scales;     // [rows, groups]
  const int32_t* offsets;  // [rows, groups]
};

// out [rows, kPanelColumns] fp32 = x times an int8 panel: exact integer sums within each group, then one fp32 chain
// over the groups. 1 <= rows <= Isa::kMaxRowsInt8.
void tile_int8(int rows, const std::byte* panel, int groups, Int8Rows x, float* out);

}  // namespace kvferry
