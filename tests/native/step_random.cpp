// Random steps, gathers, scatters and block copies through the C interface, for a build with sanitizers.
//
// With KVF_PLANT_OVERRUN the cache is 64 bytes smaller than the library is told: the overrun that must be found.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "draw.h"
#include "kvferry.h"
#include "sample.h"

namespace {

// Small weights of random sign.
std::vector<uint16_t> weights(int n, int k) {
  std::vector<uint16_t> values(static_cast<size_t>(n) * static_cast<size_t>(k));
  for (uint16_t& value : values) value = static_cast<uint16_t>(pick(0x3c00, 0x3e80) | pick(0, 1) << 15);
  return values;
}

kvf_shape random_shape() {
  kvf_shape shape{};
  shape.num_layers = 2;
  shape.hidden_size = pick(9, 70);
  shape.intermediate_size = pick(9, 70);
  shape.num_kv_heads = pick(1, 3);
  shape.num_heads = shape.num_kv_heads * pick(1, 9);
  shape.head_dim = 2 * pick(1, 24);
  shape.vocab_size = pick(2, 60);
  shape.max_len = 150;
  shape.block_size = 16 * pick(1, 2);
  shape.quantization = pick(0, 1);
  shape.tied = pick(0, 1);
  shape.qkv_bias = pick(0, 1);
  shape.output_bias = pick(0, 1);
  shape.mlp_bias = pick(0, 1);
  shape.qk_norm = pick(0, 1);
  shape.threads = pick(1, 3);
  shape.rms_norm_eps = 1e-5f;
  return shape;
}

void load(kvf_model* model, const kvf_shape& s) {
  const auto add = [&](int weight, int layer, int n, int k) {
    const int split = pick(0, n);  // rows come in two calls
    for (const auto& [first, count] : {std::pair{0, split}, std::pair{split, n - split}}) {
      if (count > 0) CHECK(kvf_model_load(model, weight, layer, weights(count, k).data(), count, k, first) == KVF_OK);
    }
  };
  const int queries = s.num_heads * s.head_dim, qkv = queries + 2 * s.num_kv_heads * s.head_dim;
  add(KVF_EMBEDDING, 0, s.vocab_size, s.hidden_size);
  add(KVF_NORM, 0, s.hidden_size, 1);
  if (!s.tied) add(KVF_HEAD, 0, s.vocab_size, s.hidden_size);
  for (int layer = 0; layer < s.num_layers; ++layer) {
    add(KVF_INPUT_NORM, layer, s.hidden_size, 1);
    add(KVF_POST_NORM, layer, s.hidden_size, 1);
    add(KVF_QKV, layer, qkv, s.hidden_size);
    add(KVF_OUTPUT, layer, s.hidden_size, queries);
    add(KVF_GATE, layer, s.intermediate_size, s.hidden_size);
    add(KVF_UP, layer, s.intermediate_size, s.hidden_size);
    if (layer == 0) CHECK(kvf_model_finish(model) == KVF_E_MISSING);
    add(KVF_DOWN, layer, s.hidden_size, s.intermediate_size);
    if (s.qkv_bias) add(KVF_QKV_BIAS, layer, qkv, 1);
    if (s.output_bias) add(KVF_OUTPUT_BIAS, layer, s.hidden_size, 1);
    if (s.mlp_bias) {
      add(KVF_GATE_BIAS, layer, s.intermediate_size, 1);
      add(KVF_UP_BIAS, layer, s.intermediate_size, 1);
      add(KVF_DOWN_BIAS, layer, s.hidden_size, 1);
    }
    if (s.qk_norm) {
      add(KVF_Q_NORM, layer, s.head_dim, 1);
      add(KVF_K_NORM, layer, s.head_dim, 1);
    }
  }
  CHECK(kvf_model_finish(model) == KVF_OK);
}

struct Sequence {
  std::vector<int32_t> table;
  int length = 0;
};

void run_model() {
  const kvf_shape shape = random_shape();
  const std::vector<int32_t> windows = {0, pick(0, 90)};
  const std::vector<float> ones(static_cast<size_t>(shape.max_len * shape.head_dim / 2), 0.75f);
  int32_t error = 1;
  const std::unique_ptr<kvf_model, Free> model(
      kvf_model_create(&shape, windows.data(), ones.data(), ones.data(), &error));
  CHECK(model && error == KVF_OK);
  load(model.get(), shape);

  constexpr int kSequences = 3;
  const int per_sequence = (shape.max_len + shape.block_size - 1) / shape.block_size;
  const int blocks = kSequences * per_sequence;
  size_t bytes = kvf_cache_bytes(&shape, blocks);
#ifdef KVF_PLANT_OVERRUN
  bytes -= 64;
#endif
  const std::unique_ptr<void, Free> cache(std::aligned_alloc(64, bytes));
  std::fill_n(static_cast<uint8_t*>(cache.get()), bytes, uint8_t{0xff});  // NaN
  CHECK(kvf_model_set_cache(model.get(), cache.get(), blocks) == KVF_OK);
  const kvf_cache all{&shape, cache.get(), blocks};

  std::vector<int32_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), source);
  std::vector<Sequence> sequences(kSequences);
  for (int i = 0; i < kSequences; ++i) {
    const auto first = order.begin() + i * per_sequence;
    sequences[static_cast<size_t>(i)].table.assign(first, first + per_sequence);
  }

  for (int step = 0; step < 12; ++step) {
    std::vector<kvf_sequence> batch;
    std::vector<std::vector<uint32_t>> tokens;
    int wanted = 0;
    for (Sequence& sequence : sequences) {
      if (sequence.length == shape.max_len) continue;
      const int rows = std::min(pick(0, 2) == 0 ? pick(1, 60) : 1, shape.max_len - sequence.length);
      std::vector<uint32_t>& own = tokens.emplace_back();
      for (int i = 0; i < rows; ++i) own.push_back(static_cast<uint32_t>(pick(0, shape.vocab_size - 1)));
      const int logits = pick(0, 2);
      batch.push_back({own.data(), sequence.table.data(), rows, sequence.length, per_sequence, logits});
      wanted += logits == KVF_ALL_LOGITS ? rows : logits;
      sequence.length += rows;
    }
    std::vector<float> logits(static_cast<size_t>(wanted * shape.vocab_size), -1.0f);
    CHECK(kvf_step(model.get(), batch.data(), static_cast<int32_t>(batch.size()), logits.data()) == KVF_OK);
    for (const float value : logits) CHECK(value == value);  // no NaN of the cache came through
    kvf_draw draw{};
    draw.temperature = draw.repetition_penalty = 1;
    draw.top_p = 0.9;
    const std::vector<kvf_draw> draws(static_cast<size_t>(wanted), draw);
    std::vector<uint32_t> drawn(draws.size());
    CHECK(kvf_model_sample(model.get(), logits.data(), wanted, draws.data(), drawn.data()) == KVF_OK);
    for (const uint32_t token : drawn) CHECK(token < static_cast<uint32_t>(shape.vocab_size));

    const Sequence& moved = sequences[static_cast<size_t>(pick(0, kSequences - 1))];
    if (moved.length == 0) continue;
    kvf_piece piece{pick(0, 1), 2, pick(0, moved.length - 1), moved.length, pick(0, shape.num_kv_heads - 1),
                    shape.num_kv_heads, 0, 0};
    const size_t size = 4 * static_cast<size_t>((piece.layer_end - piece.layer_start) *
                                                (piece.token_end - piece.token_start) *
                                                (piece.head_end - piece.head_start) * shape.head_dim);
    std::vector<uint8_t> frame(size + 1);
    uint8_t* unaligned = frame.data() + 1;
    CHECK(kvf_gather(&all, &piece, 1, moved.table.data(), per_sequence, unaligned, size) == KVF_OK);
    CHECK(kvf_scatter(&all, &piece, 1, moved.table.data(), per_sequence, unaligned, size) == KVF_OK);
  }
  const int32_t pair[2] = {order.front(), order.back()};
  CHECK(kvf_copy_blocks(&all, pair, 1) == KVF_OK);
}

}  // namespace

int main() {
  source.seed(7);
  for (int i = 0; i < 25; ++i) run_model();
  std::puts("25 models");
  return 0;
}
