// linear_main TEST [small]: runs one test; prints and exits with 1 at the first failed check.
#include <cstring>

#include "linear_check.h"
#include "tile.h"

#ifdef NDEBUG
#error "asserts must stay in"
#endif

namespace linear_test {
bool small = false;
}

int main(int count, char** arguments) {
  using namespace linear_test;
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"vectors", test_vectors}, {"quantizing", test_quantizing}, {"reference", test_reference},
               {"rows", test_rows},       {"threads", test_threads},       {"integers", print_integers},
               {"peaks", test_peaks},     {"overrun", overrun}};
  if (!kvferry::may_use_tiles()) return 2;
  small = count > 2 && std::strcmp(arguments[2], "small") == 0;
  for (const auto& test : tests) {
    if (count > 1 && std::strcmp(arguments[1], test.name) == 0) {
      test.run();
      std::printf("%s: %s passed\n", kvferry::Isa::kName, test.name);
      return 0;
    }
  }
  std::printf("no such test\n");
  return 2;
}
