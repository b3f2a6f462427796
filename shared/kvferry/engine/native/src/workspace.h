// Scratch memory of a step: grows to the largest one and is reused.
#pragma once

#include <cstddef>
#include <utility>

#include "aligned.h"
#include "bf16.h"
#include "shape.h"

namespace kvferry {

// Rows of `width` bf16 values, 64-byte aligned. Nothing writes the padding between width and stride, which is zero.
class RowBuffer {
 public:
  explicit RowBuffer(int width) : stride_((width + 31) / 32 * 32) {}

  // Content is lost if it grows. Throws std::bad_alloc, and is then as before.
  void reserve(int rows);

  bf16* row(int index) { return values_.get() + static_cast<size_t>(index) * static_cast<size_t>(stride_); }
  int stride() const { return stride_; }
  size_t bytes() const { return static_cast<size_t>(rows_) * static_cast<size_t>(stride_) * sizeof(bf16); }

 private:
  int stride_;
  int rows_ = 0;
  Aligned<bf16> values_;
};

struct Workspace {
  explicit Workspace(const Shape& shape)
      : hidden(shape.hidden_size),
        normed(shape.hidden_size),
        qkv(shape.qkv_size()),
        mixed(shape.query_size()),
        activated(shape.intermediate_size) {}

  void reserve(int rows);
  size_t bytes() const;

  RowBuffer hidden;     // the residual stream
  RowBuffer normed;
  RowBuffer qkv;
  RowBuffer mixed;      // what attention returns
  RowBuffer activated;  // silu(gate) * up
};

}  // namespace kvferry
