#include "model.h"

#include <algorithm>
#include <cstring>

namespace kvferry {

Model::Model(const Shape& shape, const int32_t* windows, const float* cos, const float* sin)
    : shape(shape),
      threads(shape.threads),
      rope(cos, sin, shape.max_len, shape.head_dim / 2),
      layers(static_cast<size_t>(shape.num_layers)),
      workspace(shape),
      slots_(static_cast<size_t>(shape.num_layers) * KVF_NUM_WEIGHTS) {
  const int width = shape.hidden_size;  // of the hidden states
  const int qkv = shape.own_qkv_size(), hidden = shape.own_hidden(), intermediate = shape.own_intermediate();
  for (int i = 0; i < shape.num_layers; ++i) {
    Layer& layer = layers[static_cast<size_t>(i)];
    layer.window = windows[i];
    layer.q_norm = layer.k_norm = nullptr;
    layer.qkv = make(qkv, width, false, shape.qkv_bias);
    layer.output = make(hidden, shape.query_size(), false, shape.output_bias);
    layer.gate_up = make(2 * intermediate, width, true, shape.mlp_bias);
    layer.down = make(hidden, shape.intermediate_size, false, shape.mlp_bias);
    add_plain(KVF_INPUT_NORM, i, width, 1, layer.input_norm);
    add_plain(KVF_POST_NORM, i, width, 1, layer.post_norm);
    if (shape.qk_norm) {
      add_plain(KVF_Q_NORM, i, shape.head_dim, 1, layer.q_norm);
      add_plain(KVF_K_NORM, i, shape.head_dim, 1, layer.k_norm);
    }
    add_rows(KVF_QKV, i, layer.qkv, qkv, 0);
    add_rows(KVF_OUTPUT, i, layer.output, hidden, 0);
    add_rows(KVF_GATE, i, layer.gate_up, intermediate, 0);
    add_rows(KVF_UP, i, layer.gate_up, intermediate, intermediate);
    add_rows(KVF_DOWN, i, layer.down, hidden, 0);
    if (shape.qkv_bias) add_bias(KVF_QKV_BIAS, i, layer.qkv, qkv, 0);
    if (shape.output_bias) add_bias(KVF_OUTPUT_BIAS, i, layer.output, hidden, 0);
    if (shape.mlp_bias) {
      add_bias(KVF_GATE_BIAS, i, layer.gate_up, intermediate, 0);
      add_bias(KVF_UP_BIAS, i, layer.gate_up, intermediate, intermediate);
      add_bias(KVF_DOWN_BIAS, i, layer.down, hidden, 0);
    }
  }
  add_plain(KVF_NORM, 0, width, 1, norm);
  head = make(shape.own_vocab(), width, false, false);
  if (shape.tied) {
    add_rows(KVF_EMBEDDING, 0, head, shape.own_vocab(), 0);
  } else {
    add_plain(KVF_EMBEDDING, 0, shape.own_vocab(), width, embedding_);
    add_rows(KVF_HEAD, 0, head, shape.own_vocab(), 0);
  }
}

Linear Model::make(int n, int k, bool gated, bool biased) {
  const WeightKind kind = shape.quantization == KVF_INT8 ? WeightKind::Int8 : WeightKind::Bf16;
  const Linear linear = make_linear(arena_, n, k, kind, gated, biased);
  const size_t columns = static_cast<size_t>(linear.panels) * kPanelColumns;
  weight_bytes += static_cast<size_t>(linear.panels) * linear.panel_bytes + (biased ? columns * sizeof(float) : 0);
  return linear;
}

void Model::add_plain(int32_t weight, int32_t layer, int n, int k, bf16*& memory) {
  const size_t count = static_cast<size_t>(n) * static_cast<size_t>(k);
  memory = arena_.take_array<bf16>(count);
  weight_bytes += count * sizeof(bf16);
  Slot& added = slot(weight, layer);
  added.n = n;
  added.k = k;
  added.plain = memory;
  added.loaded.resize(static_cast<size_t>(n));
}

void Model::add_rows(int32_t weight, int32_t layer, Linear& linear, int n, int offset) {
  Slot& added = slot(weight, layer);
  added.n = n;
  added.k = linear.k;
  added.linear = &linear;
  added.offset = offset;
  added.loaded.resize(static_cast<size_t>(n));
}

void Model::add_bias(int32_t weight, int32_t layer, Linear& linear, int n, int offset) {
  add_rows(weight, layer, linear, n, offset);
  slot(weight, layer).k = 1;
  slot(weight, layer).bias = true;
}

int32_t Model::load(int32_t weight, int32_t layer, const bf16* rows, int32_t n, int32_t k, int32_t first_row) {
  if (finished) return KVF_E_STATE;
  if (rows == nullptr || weight < 0 || weight >= KVF_NUM_WEIGHTS || layer < 0 || layer >= shape.num_layers) {
    return KVF_E_ARGUMENT;
  }
  Slot& target = slot(weight, layer);
  if (k != target.k || n < 1 || first_row < 0 || int64_t{first_row} + n > target.n) return KVF_E_SHAPE;
  if (target.plain != nullptr) {
    const auto width = static_cast<size_t>(k);
    std::memcpy(target.plain + static_cast<size_t>(first_row) * width, rows,
                static_cast<size_t>(n) * width * sizeof(bf16));
  } else if (target.bias) {
    pack_bias(*target.linear, rows, n, target.offset + first_row);
  } else {
    pack_rows(*target.linear, rows, n, target.offset + first_row);
  }
  std::fill_n(target.loaded.begin() + first_row, n, true);
  return KVF_OK;
}

int32_t Model::finish() {
  if (finished) return KVF_E_STATE;
  for (const Slot& slot : slots_) {
    if (std::find(slot.loaded.begin(), slot.loaded.end(), false) != slot.loaded.end()) return KVF_E_MISSING;
  }
  finished = true;
  slots_ = {};
  return KVF_OK;
}

void Model::embed(uint32_t token, bf16* out) const {
  const auto width = static_cast<size_t>(shape.hidden_size);
  const uint32_t row = token - static_cast<uint32_t>(shape.vocab.begin);
  if (embedding_ == nullptr) {
    unpack_row(head, static_cast<int>(row), out);
  } else {
    std::memcpy(out, embedding_ + row * width, width * sizeof(bf16));
  }
}

void Model::join(std::byte* memory) {
  group = Group(shape, memory);
  workspace.hidden.place(group.hidden);
  workspace.mixed.place(group.mixed);
  workspace.activated.place(group.activated);
}

}  // namespace kvferry
