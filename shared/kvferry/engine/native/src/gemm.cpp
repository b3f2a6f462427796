#include "gemm.h"

#include <algorithm>
#include <cassert>

#include "tile.h"

namespace kvferry {
namespace {

// Rows of x that are worked on together stay in the second cache beside a panel.
constexpr size_t kBlockBytes = size_t{384} << 10;
constexpr int kTileFloats = std::max(kTileRows, kTileRowsInt8) * kPanelColumns;

// A row's codes, scales and offsets.
constexpr size_t quantized_bytes(int groups) {
  return static_cast<size_t>(groups) * (kGroup + sizeof(float) + sizeof(int32_t));
}
static_assert(quantized_bytes(kMaxK / kGroup) <= kBlockBytes && kBlockBytes <= Threads::kScratchBytes);

// One call's operands, for one thread.
struct Product {
  const Linear& weights;
  const bf16* x;
  ptrdiff_t ldx;
  int rows;
  void* y;
  ptrdiff_t ldy;
  Epilogue epilogue;

  int k_pairs() const { return padded_k(weights.k) / 2; }
  int k_groups() const { return (weights.k + kGroup - 1) / kGroup; }
  // Panels that make one column block of y.
  int panels_per_unit() const { return weights.gated ? 2 : 1; }
  int y_columns() const { return weights.gated ? weights.n / 2 : weights.n; }
  void* y_at(int row, int column) const {
    const ptrdiff_t at = row * ldy + column;
    return epilogue == Epilogue::Logits ? static_cast<void*>(static_cast<float*>(y) + at)
                                        : static_cast<void*>(static_cast<bf16*>(y) + at);
  }
};

#ifdef KVF_SPLIT_K_BY_ROWS
// Negative control of the exactness tests, in no other build: with many rows k is summed in two halves.
void tile_in_halves(TileRegisters& registers, int rows, const bf16* panel, int pairs, const bf16* x, ptrdiff_t ldx,
                    float* out) {
  const int half = padded_k(pairs) / 2;
  float second[kTileFloats];
  tile_bf16(registers, rows, panel, half, x, ldx, out);
  tile_bf16(registers, rows, panel + half * 2 * kPanelColumns, pairs - half, x + half * 2, ldx, second);
  for (int i = 0; i < rows * kPanelColumns; ++i) out[i] += second[i];
}
#endif

// The rows of a block as its tiles read them.
class Block {
 public:
  // int8: quantises the rows, once for all panels, into `scratch`.
  Block(const Product& product, Range rows, std::byte* scratch) : product_(product), first_row_(rows.begin) {
    if (product.weights.kind != WeightKind::Int8) return;
    const int groups = product.k_groups();
    const ptrdiff_t count = rows.size();
    scales_ = reinterpret_cast<float*>(scratch);
    offsets_ = reinterpret_cast<int32_t*>(scales_ + count * groups);
    codes_ = reinterpret_cast<int8_t*>(offsets_ + count * groups);
    for (ptrdiff_t row = 0; row < count; ++row) {
      quantize_row(product.x + (rows.begin + row) * product.ldx, product.weights.k, codes_ + row * groups * kGroup,
                   scales_ + row * groups, offsets_ + row * groups);
    }
  }

  void tile(TileRegisters& registers, int row, int rows, int panel, float* out) const {
    const Linear& weights = product_.weights;
    const std::byte* packed = weights.packed + weights.panel_bytes * static_cast<size_t>(panel);
    if (weights.kind == WeightKind::Int8) {
      const int groups = product_.k_groups();
      const ptrdiff_t at = static_cast<ptrdiff_t>(row - first_row_) * groups;
      tile_int8(registers, rows, packed, groups, {codes_ + at * kGroup, scales_ + at, offsets_ + at}, out);
    } else {
#ifdef KVF_SPLIT_K_BY_ROWS
      if (product_.rows >= 8) {
        tile_in_halves(registers, rows, reinterpret_cast<const bf16*>(packed), product_.k_pairs(),
                       product_.x + row * product_.ldx, product_.ldx, out);
        return;
      }
#endif
      tile_bf16(registers, rows, reinterpret_cast<const bf16*>(packed), product_.k_pairs(),
                product_.x + row * product_.ldx, product_.ldx, out);
    }
  }

 private:
  const Product& product_;
  const int first_row_;
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* offsets_ = nullptr;
};

int max_tile_rows(WeightKind kind) { return kind == WeightKind::Int8 ? kTileRowsInt8 : kTileRows; }

// Rows of a block: whole tiles if they fit.
int block_rows(const Product& product) {
  const bool int8 = product.weights.kind == WeightKind::Int8;
  const size_t row_bytes = int8 ? quantized_bytes(product.k_groups()) : sizeof(bf16) * 2 * product.k_pairs();
  const int tile = max_tile_rows(product.weights.kind);
  const int rows = static_cast<int>(kBlockBytes / row_bytes);
  return rows >= tile ? rows / tile * tile : std::max(rows, 1);
}

void compute(const Product& product, Range rows, Range units, std::byte* scratch) {
  const int most = max_tile_rows(product.weights.kind);
  const int per_unit = product.panels_per_unit();
  const int step = block_rows(product);
  TileRegisters registers;
  alignas(64) float sums[2][kTileFloats];
  for (int begin = rows.begin; begin < rows.end; begin += step) {
    const Range block_range{begin, std::min(begin + step, rows.end)};
    const Block block(product, block_range, scratch);
    for (int unit = units.begin; unit < units.end; ++unit) {
      const int column = unit * kPanelColumns;
      const int columns = std::min(kPanelColumns, product.y_columns() - column);
      const float* bias = product.weights.bias;
      if (bias != nullptr) bias += unit * per_unit * kPanelColumns;
      for (int row = block_range.begin; row < block_range.end; row += most) {
        const int count = std::min(most, block_range.end - row);
        for (int i = 0; i < per_unit; ++i) block.tile(registers, row, count, unit * per_unit + i, sums[i]);
        const float* up_bias = bias != nullptr && per_unit == 2 ? bias + kPanelColumns : nullptr;
        finish(product.epilogue, {sums[0], bias}, {sums[1], up_bias}, count, columns, product.y_at(row, column),
               product.ldy);
      }
    }
  }
}

// Whether threads divide the rows rather than the panels: only where that balances better, as each thread then reads
// all weights.
bool splits_rows(int rows, int tile_rows, int units, int threads) {
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  const auto most = [&](int count) { return (count + threads - 1) / threads; };
  // largest share of the work: most(tiles) / tiles against most(units) / units
  return tiles >= 8 * threads && static_cast<int64_t>(most(tiles)) * units < static_cast<int64_t>(most(units)) * tiles;
}

}  // namespace

void linear(const Linear& weights, const bf16* x, int ldx, int rows, void* y, int ldy, Epilogue epilogue,
            Threads& threads, int thread) {
  assert(weights.gated == (epilogue == Epilogue::SiluMul));
  const Product product{weights, x, ldx, rows, y, ldy, epilogue};
  const int units = weights.panels / product.panels_per_unit();
  const int tile_rows = max_tile_rows(weights.kind);
  std::byte* scratch = threads.scratch(thread);
  if (splits_rows(rows, tile_rows, units, threads.count())) {
    const Range tiles = split((rows + tile_rows - 1) / tile_rows, threads.count(), thread);
    compute(product, {std::min(tiles.begin * tile_rows, rows), std::min(tiles.end * tile_rows, rows)}, {0, units},
            scratch);
  } else {
    compute(product, {0, rows}, split(units, threads.count(), thread), scratch);
  }
}

}  // namespace kvferry
