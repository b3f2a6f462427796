// Memory of weights: taken once, freed together, in huge pages where the system gives them.
#pragma once

#include <cstddef>
#include <vector>

namespace kvferry {

// Not thread-safe. What is taken is zero and lies at a multiple of 64 bytes.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Throws std::bad_alloc.
  void* take(size_t bytes);

  template <typename T>
  T* take_array(size_t count) {
    return static_cast<T*>(take(count * sizeof(T)));
  }

 private:
  struct Mapping {
    void* memory;
    size_t bytes;
  };
  std::vector<Mapping> mappings_;
  std::byte* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace kvferry
