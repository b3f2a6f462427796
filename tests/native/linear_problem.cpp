#include "linear_check.h"

namespace linear_test {

Problem::Problem(Shape wanted, int row_count, uint64_t seed) : shape(wanted), rows(row_count) {
  Random random(seed);
  const int padded = padded_k(shape.k);
  const bool gated = shape.epilogue == Epilogue::SiluMul;
  ldx = padded + random.below(5);
  ldy = (gated ? shape.n / 2 : shape.n) + random.below(5);
  matrix = random.normals(static_cast<size_t>(shape.n) * shape.k, 0.2f);
  if (shape.biased) bias = random.normals(static_cast<size_t>(shape.n));
  const bf16 nan{0x7fc0};
  x.assign(static_cast<size_t>(rows) * ldx, nan);
  for (int row = 0; row < rows; ++row) {
    bf16* values = x.data() + static_cast<size_t>(row) * ldx;
    for (int i = 0; i < padded; ++i) values[i] = to_bf16(i < shape.k ? random.normal() : 0.0f);
  }
  residual = random.normals(static_cast<size_t>(rows) * ldy);
  packed = make_linear(arena, shape.n, shape.k, shape.kind, gated, shape.biased);
  // In pieces, the second first.
  const int half = shape.n / 2;
  pack_rows(packed, matrix.data() + static_cast<size_t>(half) * shape.k, shape.n - half, half);
  pack_rows(packed, matrix.data(), half, 0);
  if (shape.biased) pack_bias(packed, bias.data(), shape.n, 0);
}

Problem::Bytes Problem::start() const {
  const size_t count = residual.size();
  Bytes y(count * element(), 0xff);
  if (shape.epilogue == Epilogue::AddResidual) std::memcpy(y.data(), residual.data(), count * sizeof(bf16));
  return y;
}

void Problem::run(Threads& threads, int first, int count, Bytes& y) const {
  const bf16* from = x.data() + static_cast<size_t>(first) * ldx;
  unsigned char* to = y.data() + static_cast<size_t>(first) * ldy * element();
  threads.run([&](int thread) { linear(packed, from, ldx, count, to, ldy, shape.epilogue, threads, thread); });
}

}  // namespace linear_test
