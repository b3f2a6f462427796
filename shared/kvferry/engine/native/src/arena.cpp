#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace kvferry {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// A model's matrices share mappings, so that those smaller than a huge page lie in one too. What is not touched costs
// nothing.
constexpr size_t kMapping = size_t{64} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Arena::~Arena() {
  for (const Mapping& mapping : mappings_) munmap(mapping.memory, mapping.bytes);
}

void* Arena::take(size_t bytes) {
  bytes = round_up(std::max<size_t>(bytes, 1), 64);
  if (bytes > left_) {
    const size_t usable = std::max(kMapping, round_up(bytes, kHugePage));
    const size_t mapped = usable + kHugePage;  // room to begin at a huge page's edge
    void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mappings_.push_back({memory, mapped});
    next_ = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(memory), kHugePage));
    left_ = usable;
#ifdef MADV_HUGEPAGE
    madvise(next_, usable, MADV_HUGEPAGE);  // refused: ordinary pages, slower but right
#endif
  }
  void* taken = next_;
  next_ += bytes;
  left_ -= bytes;
  return taken;
}

}  // namespace kvferry
