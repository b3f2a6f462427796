// The traits of the instruction set against plain C++.
#include <algorithm>
#include <cmath>

#include "exp2.h"
#include "isa.h"
#include "linear_check.h"

namespace linear_test {
namespace {

constexpr int W = Isa::kLanes;

void bf16_is_rounded_to_nearest_even() {
  Random random(1);
  for (int i = 0; i < (small ? 20000 : 100000); ++i) {
    float in[W], back[W];
    bf16 out[W];
    for (float& value : in) {
      const uint32_t bits = i < 64 ? (0x3f800000u + static_cast<uint32_t>(i) * 0x8000u) : random.bits();
      std::memcpy(&value, &bits, sizeof value);
      if (std::fabs(value) < 1.2e-38f) value = 0;  // subnormals may be flushed
    }
    Isa::store_bf16(out, Isa::load(in));
    Isa::store(back, Isa::round_bf16(Isa::load(in)));
    for (int lane = 0; lane < W; ++lane) {
      const bf16 want = to_bf16(in[lane]);
      if (std::isnan(in[lane])) {
        CHECK(std::isnan(to_float(out[lane])) && std::isnan(back[lane]) && std::isnan(to_float(want)),
              "a NaN was lost");
      } else {
        CHECK(out[lane].bits == want.bits && back[lane] == to_float(want), "%a became %a", in[lane],
              to_float(out[lane]));
      }
    }
  }
}

void parts_of_vectors_leave_the_rest_alone() {
  float in[W + 1], out[W + 1];
  bf16 half_in[W + 1], half_out[W + 1];
  for (int n = 0; n <= W; ++n) {
    for (int i = 0; i <= W; ++i) {
      in[i] = static_cast<float>(i + 1);
      half_in[i] = to_bf16(in[i]);
      out[i] = -1;
      half_out[i] = to_bf16(-1);
    }
    Isa::store_n(out, Isa::load(in), n);
    Isa::store_bf16_n(half_out, Isa::load(in), n);
    float loaded[W], half_loaded[W], blended[W];
    Isa::store(loaded, Isa::load_n(in, n));
    Isa::store(half_loaded, Isa::load_bf16_n(half_in, n));
    Isa::store(blended, Isa::blend_n(Isa::load(in), Isa::set1(-2), n));
    bf16 pairs[2 * W], kept[2 * W], low[2 * W];
    for (int i = 0; i < 2 * W; ++i) pairs[i] = to_bf16(static_cast<float>(i + 1));
    Isa::store_pairs(kept, Isa::keep_pairs_n(Isa::load_pairs(pairs), n));
    Isa::store_pairs(low, Isa::keep_low(Isa::load_pairs(pairs)));
    for (int i = 0; i <= W; ++i) {
      CHECK(out[i] == (i < n ? in[i] : -1), "store_n(%d) lane %d", n, i);
      CHECK(to_float(half_out[i]) == (i < n ? in[i] : -1), "store_bf16_n(%d) lane %d", n, i);
      if (i == W) break;
      CHECK(loaded[i] == (i < n ? in[i] : 0), "load_n(%d) lane %d", n, i);
      CHECK(half_loaded[i] == (i < n ? in[i] : 0), "load_bf16_n(%d) lane %d", n, i);
      CHECK(blended[i] == (i < n ? in[i] : -2), "blend_n(%d) lane %d", n, i);
      CHECK(kept[2 * i].bits == (i < n ? pairs[2 * i].bits : 0), "keep_pairs_n(%d) pair %d", n, i);
      CHECK(kept[2 * i + 1].bits == (i < n ? pairs[2 * i + 1].bits : 0), "keep_pairs_n(%d) pair %d", n, i);
      CHECK(low[2 * i].bits == pairs[2 * i].bits && low[2 * i + 1].bits == 0, "keep_low pair %d", i);
    }
  }
}

void sums_go_by_halves() {
  Random random(2);
  for (int round = 0; round < 1000; ++round) {
    float values[W], sums[W];
    for (float& value : values) value = random.normal();
    std::copy(values, values + W, sums);
    for (int half = W / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    CHECK(Isa::hsum(Isa::load(values)) == sums[0], "hsum");
    CHECK(Isa::hmax(Isa::load(values)) == *std::max_element(values, values + W), "hmax");
  }
}

void dots_are_right() {
  Random random(3);
  for (int round = 0; round < 1000; ++round) {
    const std::vector<bf16> a = random.normals(2 * W), b = random.normals(2);
    float acc[W], out[W], low[W], high[W];
    for (float& value : acc) value = random.normal();
    Isa::store(out, Isa::dot2(Isa::load(acc), Isa::load_pairs(a.data()), Isa::broadcast_pair(b.data())));
    Isa::store(low, Isa::low(Isa::load_pairs(a.data())));
    Isa::store(high, Isa::high(Isa::load_pairs(a.data())));
    for (int i = 0; i < W; ++i) {
      const double l = double{to_float(a[2 * i])} * to_float(b[0]), h = double{to_float(a[2 * i + 1])} * to_float(b[1]);
      const double size = std::fabs(acc[i]) + std::fabs(l) + std::fabs(h);
      CHECK(std::fabs(out[i] - (acc[i] + l + h)) <= 3e-7 * size, "dot2");
      CHECK(low[i] == to_float(a[2 * i]) && high[i] == to_float(a[2 * i + 1]), "low and high");
    }
    uint8_t u[4 * W];
    int8_t s[4];
    for (uint8_t& value : u) value = static_cast<uint8_t>(round < 4 ? 255 * (round & 1) : random.below(256));
    for (int8_t& value : s) value = static_cast<int8_t>(round < 4 ? (round & 2 ? -128 : 127) : random.below(256) - 128);
    Isa::store(out, Isa::to_float(Isa::dot4(Isa::set1_int(-7), Isa::load_bytes(u), Isa::broadcast_bytes(s))));
    for (int i = 0; i < W; ++i) {
      int want = -7;
      for (int j = 0; j < 4; ++j) want += u[4 * i + j] * s[j];
      CHECK(out[i] == static_cast<float>(want), "dot4: %g, not %d", static_cast<double>(out[i]), want);
    }
  }
}

void exponentials_are_near() {
  double worst = 0;
  for (float x = -87.0f; x < 88.0f; x += small ? 0.0371f : 0.00171f) {
    float out[W];
    Isa::store(out, exp(Isa::set1(x)));
    worst = std::max(worst, std::fabs(out[W - 1] / std::exp(double{x}) - 1));
  }
  CHECK(worst < 2e-7, "relative error %g", worst);
  float out[W];
  Isa::store(out, exp(Isa::set1(0)));
  CHECK(out[0] == 1, "e^0 is 1");
  Isa::store(out, exp(Isa::set1(-1e30f)));
  CHECK(out[0] > 0 && out[0] < 2e-38f, "finite far below");
  Isa::store(out, exp(Isa::set1(1e30f)));
  CHECK(out[0] > 1e38f && std::isfinite(out[0]), "finite far above");
}

void powers_of_two_are_near() {
  double worst = 0;
  float out[W];
  for (float x = -126.0f; x <= 1.0f; x += small ? 0.0371f : 0.00171f) {
    Isa::store(out, exp2(Isa::set1(x)));
    worst = std::max(worst, std::fabs(out[W - 1] / std::exp2(double{x}) - 1));
  }
  CHECK(worst < 3e-7, "relative error %g", worst);
  for (int x = -126; x <= 1; ++x) {
    Isa::store(out, exp2(Isa::set1(static_cast<float>(x))));
    CHECK(out[0] == std::ldexp(1.0f, x), "2^%d is %g", x, static_cast<double>(out[0]));
  }
  for (float x : {-126.5f, -1e30f}) {
    Isa::store(out, exp2(Isa::set1(x)));
    CHECK(out[0] == std::ldexp(1.0f, -126), "neither 0 nor subnormal far below");
  }
}

}  // namespace

void test_vectors() {
  bf16_is_rounded_to_nearest_even();
  parts_of_vectors_leave_the_rest_alone();
  sums_go_by_halves();
  dots_are_right();
  exponentials_are_near();
  powers_of_two_are_near();
}

}  // namespace linear_test
