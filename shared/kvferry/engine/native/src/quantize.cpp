#include "quantize.h"

#include <algorithm>
#include <cstring>

namespace kvferry {
namespace {

// Below this a group counts as zero: 127 / amax must stay finite.
constexpr float kSmallest = 1e-30f;
// Added to |v| < 2^22 it leaves v, rounded to a whole number, in the lowest bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

// Without the sign, bf16 are ordered as integers; a NaN is the largest.
float largest_magnitude(const bf16* values, int count) {
  uint16_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint16_t>(values[i].bits & 0x7fff));
  return to_float(bf16{largest});
}

int32_t rounded(float value) {
  const float shifted = value + kRounder;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits;  // its low byte is the whole number's, in two's complement
}

// The least bf16 that is not below a positive value.
bf16 rounded_up(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>((bits + 0xffff) >> 16)};
}

int32_t quantize_group(const bf16* x, int count, int8_t* codes, float* scale) {
  const float amax = largest_magnitude(x, count);
  const bool zero = amax < kSmallest;
  *scale = zero ? 0.0f : amax / 127.0f;
  const float inverse = zero ? 0.0f : 127.0f / amax;
  for (int i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(rounded(to_float(x[i]) * inverse));
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) sum += codes[i];
  return -128 * sum;
}

}  // namespace

void quantize_weights(const bf16* weights, int count, bf16* scale, uint8_t* codes) {
  const float amax = largest_magnitude(weights, count);
  const bool zero = amax < kSmallest;
  *scale = zero ? bf16{0} : rounded_up(amax / 127.0f);
  const float inverse = zero ? 0.0f : 1.0f / to_float(*scale);
  for (int i = 0; i < count; ++i) {
    codes[i] = static_cast<uint8_t>(rounded(to_float(weights[i]) * inverse) + 128);
  }
}

void quantize_row(const bf16* x, int k, int8_t* codes, float* scales, int32_t* offsets) {
  int group = 0;
  for (; (group + 1) * kGroup <= k; ++group) {
    offsets[group] = quantize_group(x + group * kGroup, kGroup, codes + group * kGroup, scales + group);
  }
  if (const int rest = k - group * kGroup; rest > 0) {
    std::memset(codes + group * kGroup, 0, kGroup);
    offsets[group] = quantize_group(x + group * kGroup, rest, codes + group * kGroup, scales + group);
  }
}

}  // namespace kvferry
