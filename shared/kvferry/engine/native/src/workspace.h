// Scratch memory of a step: grows to the largest one and is reused.
#pragma once

#include <cstddef>
#include <utility>

#include "aligned.h"
#include "bf16.h"
#include "shape.h"

namespace kvferry {

// Values from one row to the next, of rows that begin at cache lines.
constexpr int row_stride(int width) { return (width + 31) / 32 * 32; }

// Rows of `width` bf16 values, 64-byte aligned. Nothing writes the padding between width and stride, which is zero.
class RowBuffer {
 public:
  explicit RowBuffer(int width) : stride_(row_stride(width)) {}

  // Content is lost if it grows. Throws std::bad_alloc, and is then as before.
  void reserve(int rows);
  // From here on the rows lie in memory of someone else, as many as will ever be asked for.
  void place(bf16* memory) { rows_at_ = memory, placed_ = true; }

  bf16* row(int index) { return rows_at_ + static_cast<size_t>(index) * static_cast<size_t>(stride_); }
  int stride() const { return stride_; }
  size_t bytes() const { return static_cast<size_t>(rows_) * static_cast<size_t>(stride_) * sizeof(bf16); }

 private:
  int stride_;
  int rows_ = 0;
  bool placed_ = false;
  bf16* rows_at_ = nullptr;
  Aligned<bf16> values_;
};

struct Workspace {
  explicit Workspace(const Shape& shape)
      : hidden(shape.hidden_size),
        normed(shape.hidden_size),
        qkv(shape.own_qkv_size()),
        mixed(shape.query_size()),
        activated(shape.intermediate_size) {}

  void reserve(int rows);
  size_t bytes() const;

  // Ranks share hidden, mixed and activated; each writes columns of its own.
  RowBuffer hidden;     // the residual stream
  RowBuffer normed;
  RowBuffer qkv;
  RowBuffer mixed;      // what attention returns
  RowBuffer activated;  // silu(gate) * up
};

}  // namespace kvferry
