// Outputs against sums in double precision, within bounds that follow from the roundings.
#include <algorithm>
#include <cmath>

#include "linear_check.h"

namespace linear_test {
namespace {

// A value and how far the engine's may be from it.
struct Bounded {
  double value, error;
};

// bf16 keeps 8 bits: half a unit in the last place is at most 2^-8 of the value before rounding. Flushed subnormals are
// within the last term.
Bounded rounded(Bounded v) { return {v.value, v.error + (std::fabs(v.value) + v.error) / 256 + 1e-38}; }

// What an int8 product is before fp32 rounding: integers and scales are the same in every build.
class Reference {
 public:
  explicit Reference(const Problem& problem) : p_(problem), weights_(problem.matrix.size()) {
    const int n = p_.shape.n, k = p_.shape.k;
    for (size_t i = 0; i < weights_.size(); ++i) weights_[i] = to_float(p_.matrix[i]);
    if (p_.shape.kind != WeightKind::Int8) return;
    for (int row = 0; row < n; ++row) {
      for (int first = 0; first < k; first += kGroup) {
        bf16 scale;
        uint8_t codes[kGroup];
        const int count = std::min(kGroup, k - first);
        const size_t at = static_cast<size_t>(row) * k + first;
        quantize_weights(p_.matrix.data() + at, count, &scale, codes);
        for (int i = 0; i < count; ++i) weights_[at + i] = double{to_float(scale)} * (codes[i] - 128);
      }
    }
  }

  std::vector<double> input(int row) const {
    const int k = p_.shape.k;
    const bf16* from = p_.x.data() + static_cast<size_t>(row) * p_.ldx;
    std::vector<double> x(k);
    for (int i = 0; i < k; ++i) x[i] = to_float(from[i]);
    if (p_.shape.kind == WeightKind::Int8) {
      const int groups = (k + kGroup - 1) / kGroup;
      std::vector<int8_t> codes(groups * kGroup);
      std::vector<float> scales(groups);
      std::vector<int32_t> offsets(groups);
      quantize_row(from, k, codes.data(), scales.data(), offsets.data());
      for (int i = 0; i < k; ++i) x[i] = double{scales[i / kGroup]} * codes[i];
    }
    return x;
  }

  // Rounded sum of a row of x and row n of the matrix, each addition of the fp32 chain off by at most 2^-23 of the
  // sizes.
  Bounded sum(const std::vector<double>& x, int n) const {
    double value = p_.shape.biased ? to_float(p_.bias[n]) : 0, size = std::fabs(value);
    for (int i = 0; i < p_.shape.k; ++i) {
      const double product = x[i] * weights_[static_cast<size_t>(n) * p_.shape.k + i];
      value += product;
      size += std::fabs(product);
    }
    return rounded({value, size * (p_.shape.k + 4) * 1.2e-7});
  }

  Bounded output(const std::vector<double>& x, int row, int column) const {
    const Bounded v = sum(x, column);
    switch (p_.shape.epilogue) {
      case Epilogue::AddResidual: {
        const double residual = to_float(p_.residual[static_cast<size_t>(row) * p_.ldy + column]);
        return rounded({residual + v.value, v.error});
      }
      case Epilogue::SiluMul: {
        const Bounded up = sum(x, p_.shape.n / 2 + column);
        // The slope of silu is below 1.1.
        const Bounded gate = rounded({v.value / (1 + std::exp(-v.value)), 1.1 * v.error + 1e-6 * std::fabs(v.value)});
        return rounded({gate.value * up.value,
                        gate.error * (std::fabs(up.value) + up.error) + std::fabs(gate.value) * up.error});
      }
      default:
        return v;
    }
  }

 private:
  const Problem& p_;
  std::vector<double> weights_;
};

void check_near(const Problem& problem, const Problem::Bytes& y) {
  const Reference reference(problem);
  for (int row = 0; row < problem.rows; ++row) {
    const std::vector<double> x = reference.input(row);
    for (int column = 0; column < problem.ldy; ++column) {
      const unsigned char* at = y.data() + (static_cast<size_t>(row) * problem.ldy + column) * problem.element();
      float got;
      bf16 half;
      std::memcpy(&half, at, sizeof half);
      if (problem.shape.epilogue == Epilogue::Logits) {
        std::memcpy(&got, at, sizeof got);
      } else {
        got = to_float(half);
      }
      if (column >= problem.columns()) {
        const bool residual = problem.shape.epilogue == Epilogue::AddResidual;
        CHECK(residual ? half.bits == problem.residual[static_cast<size_t>(row) * problem.ldy + column].bits
                       : half.bits == 0xffff,
              "padding of row %d was written", row);
        continue;
      }
      const Bounded want = reference.output(x, row, column);
      CHECK(std::fabs(got - want.value) <= want.error, "n %d k %d row %d column %d: %g, not %g within %g",
            problem.shape.n, problem.shape.k, row, column, static_cast<double>(got), want.value, want.error);
    }
  }
}

}  // namespace

void test_reference() {
  Threads threads(2);
  const int shapes[][2] = {{1, 1}, {2, 3}, {50, 2}, {96, 64}, {98, 65}, {130, 127}, {48, 640}, {34, 1537}};
  uint64_t seed = 0;
  for (const auto& [n, k] : shapes) {
    for (WeightKind kind : {WeightKind::Bf16, WeightKind::Int8}) {
      for (Epilogue epilogue : {Epilogue::Store, Epilogue::AddResidual, Epilogue::SiluMul, Epilogue::Logits}) {
        if (epilogue == Epilogue::SiluMul && n % 2 != 0) continue;
        for (bool biased : {false, true}) {
          if (small && biased != (k % 2 != 0)) continue;
          const Problem problem({n, k, kind, epilogue, biased}, small ? 11 : 29, ++seed);
          Problem::Bytes y = problem.start();
          problem.run(threads, 0, problem.rows, y);
          check_near(problem, y);
        }
      }
    }
  }
}

}  // namespace linear_test
