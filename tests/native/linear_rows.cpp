// A row's bits are its own: the same alone, in any batch, in any split into calls and on any number of threads.
#include <algorithm>
#include <cmath>

#include "linear_check.h"

namespace linear_test {
namespace {

size_t row_bytes(const Problem& problem) { return static_cast<size_t>(problem.ldy) * problem.element(); }

void check_equal(const Problem& problem, const Problem::Bytes& alone, const Problem::Bytes& y, int rows,
                 const char* how, int count) {
  for (int row = 0; row < rows; ++row) {
    const size_t at = static_cast<size_t>(row) * row_bytes(problem);
    CHECK(std::memcmp(alone.data() + at, y.data() + at, row_bytes(problem)) == 0,
          "row %d of %d differs %s %d (n %d k %d kind %d epilogue %d)", row, rows, how, count, problem.shape.n,
          problem.shape.k, static_cast<int>(problem.shape.kind), static_cast<int>(problem.shape.epilogue));
  }
}

// Rows [0, rows) in calls of random sizes.
Problem::Bytes in_calls(const Problem& problem, Threads& threads, int rows, Random& random) {
  Problem::Bytes y = problem.start();
  for (int row = 0; row < rows;) {
    const int count = std::min(1 + random.below(random.below(4) == 0 ? rows : 12), rows - row);
    problem.run(threads, row, count, y);
    row += count;
  }
  return y;
}

void check_rows(const Shape& shape, int most, uint64_t seed) {
  Random random(seed);
  const Problem problem(shape, most, seed);
  Threads one(1), two(2), three(3), four(4);
  Threads* pools[] = {&one, &two, &three, &four};
  Problem::Bytes alone = problem.start();
  for (int row = 0; row < most; ++row) problem.run(one, row, 1, alone);
  // Every row is used: rows that are all alike would hide a mistake.
  const size_t row = row_bytes(problem);
  CHECK(most == 1 || std::memcmp(alone.data(), alone.data() + row, row) != 0, "rows alike");
  for (int rows = 1; rows <= most; rows += rows < 70 || most - rows < 3 ? 1 : 41) {
    Problem::Bytes y = problem.start();
    Threads& pool = *pools[rows % 4];
    problem.run(pool, 0, rows, y);
    check_equal(problem, alone, y, rows, "in one call on threads:", pool.count());
  }
  for (Threads* pool : pools) {
    check_equal(problem, alone, in_calls(problem, *pool, most, random), most, "in calls on threads:", pool->count());
  }
}

// What another row holds, even NaN, doesn't reach a row.
void check_poison(WeightKind kind) {
  Threads one(1);
  Problem problem({50, 130, kind, Epilogue::Store, false}, 17, 99);
  Problem::Bytes clean = problem.start(), poisoned = problem.start();
  problem.run(one, 0, problem.rows, clean);
  for (int i = 0; i < 130; ++i) problem.x[static_cast<size_t>(5) * problem.ldx + i] = bf16{0x7fc0};
  problem.run(one, 0, problem.rows, poisoned);
  for (int row = 0; row < problem.rows; ++row) {
    const size_t at = static_cast<size_t>(row) * row_bytes(problem);
    const bool same = std::memcmp(clean.data() + at, poisoned.data() + at, row_bytes(problem)) == 0;
    CHECK(same == (row != 5), "row %d", row);
    bf16 first;
    std::memcpy(&first, poisoned.data() + at, sizeof first);
    CHECK(std::isnan(to_float(first)) == (row == 5), "row %d", row);
  }
}

}  // namespace

// For the address sanitizer to find: y ends one value early.
void overrun() {
  Threads one(1);
  const Problem problem({2 * kPanelColumns, 64, WeightKind::Bf16, Epilogue::Store, false}, 3, 1);
  std::vector<bf16> y(static_cast<size_t>(problem.rows) * problem.columns() - 1);
  linear(problem.packed, problem.x.data(), problem.ldx, problem.rows, y.data(), problem.columns(), Epilogue::Store,
         one, 0);
}

void test_rows() {
  const int most = small ? 37 : 600;
  uint64_t seed = 100;
  for (WeightKind kind : {WeightKind::Bf16, WeightKind::Int8}) {
    check_rows({98, 130, kind, Epilogue::Store, true}, most, ++seed);
    check_rows({97, 67, kind, Epilogue::AddResidual, false}, most, ++seed);
    check_rows({196, 77, kind, Epilogue::SiluMul, true}, most, ++seed);
    check_rows({110, 256, kind, Epilogue::Logits, false}, small ? most : 100, ++seed);
    // More than one block of rows.
    check_rows({50, small ? 1031 : 4111, kind, Epilogue::Store, false}, small ? 20 : 120, ++seed);
    if (!small) check_rows({17, kMaxK, kind, Epilogue::Store, false}, 9, ++seed);
    check_poison(kind);
  }
}

}  // namespace linear_test
