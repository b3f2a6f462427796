#include <algorithm>
#include <cmath>

#include "linear_check.h"

namespace linear_test {
namespace {

void rows_are_unpacked_as_they_were_packed() {
  for (const auto& [n, k] : {std::pair{1, 1}, {98, 65}, {130, 192}}) {
    for (bool gated : {false, true}) {
      if (gated && n % 2 != 0) continue;
      const Epilogue epilogue = gated ? Epilogue::SiluMul : Epilogue::Store;
      const Problem exact({n, k, WeightKind::Bf16, epilogue, false}, 1, 7);
      const Problem coded({n, k, WeightKind::Int8, epilogue, false}, 1, 7);
      std::vector<bf16> row(k);
      for (int i = 0; i < n; ++i) {
        const bf16* want = exact.matrix.data() + static_cast<size_t>(i) * k;
        unpack_row(exact.packed, i, row.data());
        CHECK(std::memcmp(row.data(), want, k * sizeof(bf16)) == 0, "row %d of %d", i, n);
        unpack_row(coded.packed, i, row.data());
        for (int j = 0; j < k; ++j) {
          float amax = 0;
          const int group = j / kGroup * kGroup;
          for (int m = group; m < std::min(group + kGroup, k); ++m) amax = std::max(amax, std::fabs(to_float(want[m])));
          // Half a step of the scale, which its own rounding makes up to 1/128 longer, and the result's rounding.
          const float bound = amax / 127 / 2 * (1 + 1.0f / 128) + std::fabs(to_float(want[j])) / 256 + 1e-6f;
          CHECK(std::fabs(to_float(row[j]) - to_float(want[j])) <= bound, "row %d, k %d", i, j);
        }
      }
    }
  }
}

void zeros_and_tiny_values_stay_finite() {
  bf16 values[kGroup] = {}, scale;
  uint8_t codes[kGroup];
  int8_t row[kGroup];
  float row_scale;
  int32_t offset;
  for (uint16_t bits : {0x0000, 0x8000, 0x0001, 0x0080, 0x7f7f}) {
    values[3].bits = bits;
    quantize_weights(values, kGroup, &scale, codes);
    quantize_row(values, kGroup, row, &row_scale, &offset);
    CHECK(std::isfinite(to_float(scale)) && std::isfinite(row_scale), "bits %04x", bits);
    CHECK(codes[0] == 128 && row[0] == 0 && offset == -128 * row[3], "bits %04x", bits);
    if (bits == 0x7f7f) CHECK(row[3] == 127 && codes[3] >= 128 + 126, "the largest value has the largest code");
  }
  values[3].bits = 0x7fc0;
  quantize_row(values, kGroup, row, &row_scale, &offset);
  CHECK(std::isnan(row_scale), "a NaN must not vanish");
}

// The error of an int8 product against the exact one, relative to the outputs' root mean square.
void int8_is_accurate() {
  Threads one(1);
  const Shape shape{96, 576, WeightKind::Int8, Epilogue::Logits, false};
  const Problem problem(shape, 16, 11);
  Problem::Bytes y = problem.start();
  problem.run(one, 0, problem.rows, y);
  double error = 0, size = 0;
  for (int row = 0; row < problem.rows; ++row) {
    for (int column = 0; column < shape.n; ++column) {
      double want = 0;
      for (int i = 0; i < shape.k; ++i) {
        want += double{to_float(problem.x[static_cast<size_t>(row) * problem.ldx + i])} *
                to_float(problem.matrix[static_cast<size_t>(column) * shape.k + i]);
      }
      float got;
      std::memcpy(&got, y.data() + (static_cast<size_t>(row) * problem.ldy + column) * sizeof got, sizeof got);
      error += (got - want) * (got - want);
      size += want * want;
    }
  }
  const double relative = std::sqrt(error / size);
  std::printf("int8: relative error %.5f\n", relative);
  CHECK(relative < 0.012, "relative error %g", relative);
}

}  // namespace

void test_quantizing() {
  rows_are_unpacked_as_they_were_packed();
  zeros_and_tiny_values_stay_finite();
  int8_is_accurate();
}

// A digest of codes, scales and integer sums, to compare builds with each other.
void print_integers() {
  uint64_t digest = 14695981039346656037u;
  const auto add = [&](const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) digest = (digest ^ static_cast<const unsigned char*>(from)[i]) * 1099511628211u;
  };
  Random random(5);
  for (int round = 0; round < 200; ++round) {
    const std::vector<bf16> x = random.normals(100, 3.0f), w = random.normals(kGroup, 0.1f);
    int8_t codes[2 * kGroup];
    float scales[2];
    int32_t offsets[2];
    quantize_row(x.data(), 100, codes, scales, offsets);
    bf16 scale;
    uint8_t weight_codes[kGroup];
    quantize_weights(w.data(), kGroup, &scale, weight_codes);
    add(codes, sizeof codes);
    add(scales, sizeof scales);
    add(offsets, sizeof offsets);
    add(&scale, sizeof scale);
    add(weight_codes, sizeof weight_codes);
    float sums[Isa::kLanes];
    for (int i = 0; i < kGroup; i += 4) {
      uint8_t u8[4 * Isa::kLanes];
      for (int lane = 0; lane < Isa::kLanes; ++lane) std::memcpy(u8 + 4 * lane, weight_codes + i, 4);
      Isa::store(sums, Isa::to_float(Isa::dot4(Isa::set1_int(offsets[0]), Isa::load_bytes(u8),
                                               Isa::broadcast_bytes(codes + i))));
      add(sums, sizeof(float));
    }
  }
  std::printf("integers %016llx\n", static_cast<unsigned long long>(digest));
}

}  // namespace linear_test
