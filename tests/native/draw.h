// What programs that draw random models share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>

#include "kvferry.h"

inline std::mt19937 source;  // each program's main seeds it

inline int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(source); }

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(2);                                                        \
    }                                                                      \
  } while (false)

struct Free {
  void operator()(kvf_model* model) const { kvf_model_free(model); }
  void operator()(void* memory) const { std::free(memory); }
};
