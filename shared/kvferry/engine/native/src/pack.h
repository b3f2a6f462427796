// Weights of linear layers in the order in which the kernels read them.
//
// Output columns (rows of the [n, k] checkpoint matrix) are grouped in panels of kPanelColumns = W * kPanelVectors. A
// panel is contiguous, k runs through it in steps, and each step holds a few consecutive k of every column:
//
//   bf16  [k padded to kDepth / 2][kPanelColumns][2] bf16
//   int8  [k padded to 64 / 64] groups of { [kPanelColumns] bf16 scales, [16][kPanelColumns][4] u8 codes }
//         weight = scale * (code - 128). Scales lie beside their codes because one stream from memory is faster than
//         two, by more than whole cache lines for the codes would gain.
//
// Padding is zero. A gated matrix (SwiGLU: gate and up) alternates panels, gate first, so that one pass has both halves
// of an output at hand.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "bf16.h"
#include "isa.h"
#include "quantize.h"

namespace kvferry {

constexpr int kPanelColumns = Isa::kLanes * Isa::kPanelVectors;
constexpr int kDepth = Isa::kTiles ? 32 : 2;  // k of bf16 that are multiplied at once
constexpr int kMaxK = 1 << 16;  // a few quantised rows must fit Threads::kScratchBytes, see gemm.cpp
constexpr int kMaxN = 1 << 22;

constexpr int padded_k(int k) { return (k + kDepth - 1) / kDepth * kDepth; }

enum class WeightKind : int32_t { Bf16 = 0, Int8 = 1 };

// Weights of y = x W^T + b, W [n, k]. A view: the arena owns the memory.
struct Linear {
  int n = 0, k = 0;
  WeightKind kind = WeightKind::Bf16;
  bool gated = false;            // rows [0, n/2) are the gate, rows [n/2, n) are up
  int panels = 0;
  size_t panel_bytes = 0;
  std::byte* packed = nullptr;   // [panels] of panel_bytes
  float* bias = nullptr;         // [panels * kPanelColumns] in packed column order, or none
};

// Memory for a matrix and, if asked, its bias; all zero. 0 < n <= kMaxN, 0 < k <= kMaxK, n even if gated (asserted).
// Throws std::bad_alloc.
Linear make_linear(Arena& arena, int n, int k, WeightKind kind, bool gated, bool biased);

// Copies or quantises rows [first_row, first_row + count) of the matrix from `rows`, [count, k] dense. They must lie in
// [0, n). Different rows may be packed by different threads at once.
void pack_rows(const Linear& linear, const bf16* rows, int count, int first_row);
void pack_bias(const Linear& linear, const bf16* bias, int count, int first_row);

// Row `row` of the matrix as loaded, k values: an embedding looked up in the head's weights. From int8: dequantised and
// rounded to bf16.
void unpack_row(const Linear& linear, int row, bf16* out);

// Bytes of an int8 group of a panel.
constexpr size_t kGroupBytes = size_t{kPanelColumns} * (sizeof(bf16) + kGroup);

// The panel and column in it where a row is packed.
struct PackedColumn {
  int panel, column;
};
inline PackedColumn packed_column(const Linear& linear, int row) {
  if (!linear.gated) return {row / kPanelColumns, row % kPanelColumns};
  const int half = linear.n / 2, up = row >= half;
  const int place = row - up * half;
  return {place / kPanelColumns * 2 + up, place % kPanelColumns};
}

}  // namespace kvferry
