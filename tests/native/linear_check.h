// What the C++ tests of the linear layers share: checks that no build flag removes, seeded values, operands.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gemm.h"

#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::printf("%s:%d: %s\n  ", __FILE__, __LINE__, #condition);                  \
      std::printf(__VA_ARGS__);                                                      \
      std::printf("\n");                                                             \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

namespace linear_test {

using namespace kvferry;

// Whether shapes are few and small: under an emulator or a sanitizer.
extern bool small;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int below(int bound) { return static_cast<int>(bits() % static_cast<uint32_t>(bound)); }
  // About normal: the sum of four uniform values.
  float normal() {
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(bits() >> 8) / (1 << 24);
    return (sum - 2.0f) * 1.7f;
  }
  std::vector<bf16> normals(size_t count, float scale = 1.0f) {
    std::vector<bf16> values(count);
    for (bf16& value : values) value = to_bf16(normal() * scale);
    return values;
  }

 private:
  uint64_t state_;
};

struct Shape {
  int n, k;
  WeightKind kind;
  Epilogue epilogue;
  bool biased;
};

// A packed matrix, its rows, and rows of x. What callers need not keep clean holds NaN.
struct Problem {
  Shape shape;
  int rows, ldx, ldy;
  std::vector<bf16> matrix, bias, x, residual;  // [n, k], [n], [rows, ldx], [rows, ldy]
  Arena arena;
  Linear packed;

  Problem(Shape shape, int rows, uint64_t seed);
  int columns() const { return packed.gated ? shape.n / 2 : shape.n; }
  size_t element() const { return shape.epilogue == Epilogue::Logits ? sizeof(float) : sizeof(bf16); }

  // y [rows, ldy] of the rows [first, first + count), all else as it was at the start.
  using Bytes = std::vector<unsigned char>;
  Bytes start() const;
  void run(Threads& threads, int first, int count, Bytes& y) const;
};

void test_vectors();
void test_quantizing();
void test_reference();
void test_rows();
void test_threads();
void test_peaks();
void overrun();
void print_integers();

}  // namespace linear_test
