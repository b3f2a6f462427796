// What happens to a tile's sums before they are stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"

namespace kvferry {

enum class Epilogue : int32_t {
  Store,        // bf16 y = round(v)                 v = x W^T + b in fp32
  AddResidual,  // bf16 y = round(y + round(v))
  SiluMul,      // bf16 y = round(round(silu(round(gate))) * round(up)), [rows, n / 2]; gated weights, and only they
  Logits,       // fp32 y = round(v)
};

// A tile's sums, [rows, kPanelColumns] fp32, and the bias of its columns or null. SiluMul has two: gate and up.
struct Sums {
  const float* values;
  const float* bias;
};

// Finishes `columns` columns (at most kPanelColumns) of `rows` rows into y, whose rows are ldy elements apart.
void finish(Epilogue epilogue, Sums sums, Sums up, int rows, int columns, void* y, ptrdiff_t ldy);

}  // namespace kvferry
