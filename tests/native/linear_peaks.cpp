#include "linear_check.h"
#include "peaks.h"

namespace linear_test {

// Bounds that any processor of the last decade keeps; a loop that the compiler removed would break the upper ones.
void test_peaks() {
  const std::vector<char> memory(size_t{32} << 20, 1);
  const double flops = kvf_peak_dot(0.01), bytes = kvf_peak_read(memory.data(), memory.size());
  std::printf("%.1f GFLOP/s, %.1f GB/s\n", flops / 1e9, bytes / 1e9);
  CHECK(flops > 1e7 && flops < 1e13, "%g FLOP/s", flops);
  CHECK(bytes > 1e7 && bytes < 5e11, "%g bytes/s", bytes);
}

}  // namespace linear_test
