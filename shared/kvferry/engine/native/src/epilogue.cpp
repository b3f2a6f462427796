#include "epilogue.h"

#include "pack.h"

namespace kvferry {
namespace {

using F = Isa::F;
constexpr int W = Isa::kLanes;

// Lanes at `at`, biased and rounded. The padding of a panel is there to be loaded.
inline F rounded(Sums sums, int row, int at) {
  F value = Isa::load(sums.values + row * kPanelColumns + at);
  if (sums.bias != nullptr) value = Isa::add(value, Isa::load(sums.bias + at));
  return Isa::round_bf16(value);
}

inline F silu(F x) {
  const F one = Isa::set1(1.0f);
  return Isa::div(x, Isa::add(one, exp(Isa::sub(Isa::zero(), x))));
}

// Calls each(row, column, lanes) for all vectors of a tile, the last of a row perhaps partial.
template <typename Each>
inline void for_vectors(int rows, int columns, Each each) {
  for (int row = 0; row < rows; ++row) {
    int column = 0;
    for (; column + W <= columns; column += W) each(row, column, W);
    if (column < columns) each(row, column, columns - column);
  }
}

inline void store(bf16* to, F value, int lanes) {
  if (lanes == W) {
    Isa::store_bf16(to, value);
  } else {
    Isa::store_bf16_n(to, value, lanes);
  }
}

}  // namespace

void finish(Epilogue epilogue, Sums sums, Sums up, int rows, int columns, void* y, ptrdiff_t ldy) {
  bf16* half = static_cast<bf16*>(y);
  float* full = static_cast<float*>(y);
  switch (epilogue) {
    case Epilogue::Store:
      for_vectors(rows, columns, [&](int row, int column, int lanes) {
        store(half + row * ldy + column, rounded(sums, row, column), lanes);
      });
      break;
    case Epilogue::AddResidual:
      for_vectors(rows, columns, [&](int row, int column, int lanes) {
        bf16* to = half + row * ldy + column;
        const F residual = lanes == W ? Isa::load_bf16(to) : Isa::load_bf16_n(to, lanes);
        store(to, Isa::add(residual, rounded(sums, row, column)), lanes);
      });
      break;
    case Epilogue::SiluMul:
      for_vectors(rows, columns, [&](int row, int column, int lanes) {
        const F gate = Isa::round_bf16(silu(rounded(sums, row, column)));
        store(half + row * ldy + column, Isa::mul(gate, rounded(up, row, column)), lanes);
      });
      break;
    case Epilogue::Logits:
      for_vectors(rows, columns, [&](int row, int column, int lanes) {
        float* to = full + row * ldy + column;
        const F value = rounded(sums, row, column);
        if (lanes == W) {
          Isa::store(to, value);
        } else {
          Isa::store_n(to, value, lanes);
        }
      });
      break;
  }
}

}  // namespace kvferry
