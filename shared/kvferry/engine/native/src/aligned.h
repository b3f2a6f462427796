// Memory that begins at a cache line.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace kvferry {

constexpr std::align_val_t kLineAlignment{64};

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete[](memory, kLineAlignment); }
};

// Of plain values, of any content.
template <typename T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

// Throws std::bad_alloc.
template <typename T>
Aligned<T> make_aligned(size_t count) {
  return Aligned<T>(static_cast<T*>(::operator new[](count * sizeof(T), kLineAlignment)));
}

}  // namespace kvferry
