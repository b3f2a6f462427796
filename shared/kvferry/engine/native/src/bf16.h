// bfloat16 as it lies in memory, and its conversions for single values.
//
// Kernels round with Isa::store_bf16 or Isa::round_bf16, never with the scalar conversion: an instruction set may flush
// subnormal results, and one output must be rounded by the same instruction whatever its column or batch.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvferry {

struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Round to nearest, ties to even; a NaN stays one.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  bits += 0x7fffu + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace kvferry
