// RMSNorm at Hugging Face's rounding points: in fp32, rounded to bf16, times the weight, rounded.
#pragma once

#include "bf16.h"

namespace kvferry {

// y may be x. `size` values; nothing beyond is read or written.
void rms_norm(const bf16* x, const bf16* weight, float eps, int size, bf16* y);

}  // namespace kvferry
