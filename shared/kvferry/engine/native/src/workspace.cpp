#include "workspace.h"

#include <cstring>
#include <initializer_list>

namespace kvferry {

void RowBuffer::reserve(int rows) {
  if (placed_ || rows <= rows_) return;
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(stride_);
  Aligned<bf16> grown = make_aligned<bf16>(count);
  std::memset(grown.get(), 0, count * sizeof(bf16));
  values_ = std::move(grown);
  rows_at_ = values_.get();
  rows_ = rows;
}

void Workspace::reserve(int rows) {
  for (RowBuffer* buffer : {&hidden, &normed, &qkv, &mixed, &activated}) buffer->reserve(rows);
}

size_t Workspace::bytes() const {
  return hidden.bytes() + normed.bytes() + qkv.bytes() + mixed.bytes() + activated.bytes();
}

}  // namespace kvferry
