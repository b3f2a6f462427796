#include "pack.h"

#include <cassert>
#include <cstring>

namespace kvferry {
namespace {

constexpr int ceil_div(int value, int unit) { return (value + unit - 1) / unit; }

std::byte* panel_of(const Linear& linear, PackedColumn at) {
  return linear.packed + linear.panel_bytes * static_cast<size_t>(at.panel);
}

// Where k = 2 * pair of a column lies in a bf16 panel.
bf16* pair_of(std::byte* panel, int column, int pair) {
  return reinterpret_cast<bf16*>(panel) + (static_cast<size_t>(pair) * kPanelColumns + column) * 2;
}

struct Int8Group {
  bf16* scale;
  uint8_t* codes;  // of k = 0 .. 3, the next four kPanelColumns * 4 bytes on
};

Int8Group group_of(std::byte* panel, int column, int group) {
  std::byte* base = panel + kGroupBytes * static_cast<size_t>(group);
  std::byte* codes = base + kPanelColumns * sizeof(bf16) + static_cast<size_t>(column) * 4;
  return {reinterpret_cast<bf16*>(base) + column, reinterpret_cast<uint8_t*>(codes)};
}

void pack_row_bf16(std::byte* panel, int column, const bf16* row, int k) {
  for (int pair = 0; pair < k / 2; ++pair) std::memcpy(pair_of(panel, column, pair), row + pair * 2, 2 * sizeof(bf16));
  if (k % 2 != 0) *pair_of(panel, column, k / 2) = row[k - 1];
}

void pack_row_int8(std::byte* panel, int column, const bf16* row, int k) {
  for (int first = 0; first < k; first += kGroup) {
    const Int8Group group = group_of(panel, column, first / kGroup);
    uint8_t codes[kGroup] = {};
    quantize_weights(row + first, k - first < kGroup ? k - first : kGroup, group.scale, codes);
    for (int i = 0; i < kGroup; i += 4) std::memcpy(group.codes + static_cast<size_t>(i) * kPanelColumns, codes + i, 4);
  }
}

void unpack_row_int8(std::byte* panel, int column, int k, bf16* out) {
  for (int i = 0; i < k; ++i) {
    const Int8Group group = group_of(panel, column, i / kGroup);
    const int in_group = i % kGroup;
    const int code = group.codes[static_cast<size_t>(in_group / 4) * kPanelColumns * 4 + in_group % 4];
    out[i] = to_bf16(to_float(*group.scale) * static_cast<float>(code - 128));
  }
}

}  // namespace

Linear make_linear(Arena& arena, int n, int k, WeightKind kind, bool gated, bool biased) {
  assert(n > 0 && n <= kMaxN && k > 0 && k <= kMaxK && !(gated && n % 2 != 0));
  Linear linear;
  linear.n = n;
  linear.k = k;
  linear.kind = kind;
  linear.gated = gated;
  linear.panels = gated ? 2 * ceil_div(n / 2, kPanelColumns) : ceil_div(n, kPanelColumns);
  linear.panel_bytes = kind == WeightKind::Int8
                           ? kGroupBytes * static_cast<size_t>(ceil_div(k, kGroup))
                           : sizeof(bf16) * kPanelColumns * static_cast<size_t>(padded_k(k));
  linear.packed = static_cast<std::byte*>(arena.take(linear.panel_bytes * static_cast<size_t>(linear.panels)));
  if (biased) linear.bias = arena.take_array<float>(static_cast<size_t>(linear.panels) * kPanelColumns);
  return linear;
}

void pack_rows(const Linear& linear, const bf16* rows, int count, int first_row) {
  assert(first_row >= 0 && count >= 0 && first_row + count <= linear.n);
  for (int row = 0; row < count; ++row) {
    const PackedColumn at = packed_column(linear, first_row + row);
    const bf16* from = rows + static_cast<size_t>(row) * linear.k;
    if (linear.kind == WeightKind::Int8) {
      pack_row_int8(panel_of(linear, at), at.column, from, linear.k);
    } else {
      pack_row_bf16(panel_of(linear, at), at.column, from, linear.k);
    }
  }
}

void pack_bias(const Linear& linear, const bf16* bias, int count, int first_row) {
  assert(linear.bias != nullptr && first_row >= 0 && count >= 0 && first_row + count <= linear.n);
  for (int row = 0; row < count; ++row) {
    const PackedColumn at = packed_column(linear, first_row + row);
    linear.bias[at.panel * kPanelColumns + at.column] = to_float(bias[row]);
  }
}

void unpack_row(const Linear& linear, int row, bf16* out) {
  assert(row >= 0 && row < linear.n);
  const PackedColumn at = packed_column(linear, row);
  std::byte* panel = panel_of(linear, at);
  if (linear.kind == WeightKind::Int8) {
    unpack_row_int8(panel, at.column, linear.k, out);
    return;
  }
  for (int pair = 0; pair < linear.k / 2; ++pair) {
    std::memcpy(out + pair * 2, pair_of(panel, at.column, pair), 2 * sizeof(bf16));
  }
  if (linear.k % 2 != 0) out[linear.k - 1] = *pair_of(panel, at.column, linear.k / 2);
}

}  // namespace kvferry
