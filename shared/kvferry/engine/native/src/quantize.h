// int8: groups of kGroup consecutive k, each with its scale. Plain C++ in fp32 without contraction, so that every build
// gives the same codes and scales.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"

namespace kvferry {

constexpr int kGroup = 64;  // k that share a scale

// Weights: w = scale * (code - 128), code in 1 .. 255. The scale is a bf16 and the codes are chosen for it, so its few
// bits cost next to nothing. `count` <= kGroup weights; w and codes are dense.
void quantize_weights(const bf16* weights, int count, bf16* scale, uint8_t* codes);

// A row of activations: x = scale * code, code in -127 .. 127, ties to even.
//   codes    [k rounded up to kGroup], zero beyond k
//   scales   [groups]
//   offsets  [groups] -128 * the sum of the group's codes: takes back the 128 that weight codes have too much
// A NaN or infinity makes its group's scale one, and so the outputs of its row.
void quantize_row(const bf16* x, int k, int8_t* codes, float* scales, int32_t* offsets);

}  // namespace kvferry
