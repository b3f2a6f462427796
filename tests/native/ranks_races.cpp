// Random models over several ranks, each on a thread that takes steps with the others, for a build that looks for
// races; and the same model whole: its logits must be the ranks', bit for bit.
//
// With KVF_SKIP_BARRIER ranks don't wait for each other: the races that must be found.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "draw.h"
#include "kvferry.h"

namespace {

using Memory = std::unique_ptr<void, Free>;

Memory memory_of(size_t bytes, int content) {
  Memory memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  std::memset(memory.get(), content, bytes);
  return memory;
}

constexpr int kBlocks = 8;
constexpr int kTokens = 40;

kvf_shape random_shape(int ranks) {
  kvf_shape shape{};
  shape.num_layers = 2;
  shape.hidden_size = pick(9, 70);
  shape.intermediate_size = pick(9, 70);
  const bool shared = pick(0, 1) == 1;  // one KV head, in all ranks
  shape.num_kv_heads = shared ? 1 : ranks + pick(0, 1);
  shape.num_heads = shape.num_kv_heads * (shared ? ranks + pick(0, 2) : pick(1, 3));
  shape.head_dim = 2 * pick(1, 24);
  shape.vocab_size = pick(9, 60);
  shape.max_len = 64;
  shape.block_size = 16;
  shape.quantization = pick(0, 1);
  shape.tied = pick(0, 1);
  shape.qk_norm = pick(0, 1);
  shape.output_bias = pick(0, 1);
  shape.threads = pick(1, 2);
  shape.rms_norm_eps = 1e-5f;
  return shape;
}

kvf_range cut(int count, int ranks, int rank) { return {count * rank / ranks, count * (rank + 1) / ranks}; }

kvf_shape of_rank(kvf_shape shape, int ranks, int rank) {
  const int group = shape.num_heads / shape.num_kv_heads;
  shape.ranks = ranks;
  shape.rank = rank;
  shape.max_rows = kTokens;
  if (shape.num_kv_heads == 1) {
    shape.heads = cut(shape.num_heads, ranks, rank);
    shape.kv_heads = {0, 1};
  } else {
    shape.kv_heads = cut(shape.num_kv_heads, ranks, rank);
    shape.heads = {shape.kv_heads.begin * group, shape.kv_heads.end * group};
  }
  shape.hidden = cut(shape.hidden_size, ranks, rank);
  shape.intermediate = cut(shape.intermediate_size, ranks, rank);
  shape.vocab = cut(shape.vocab_size, ranks, rank);
  return shape;
}

// Rows [first, end) of a weight of the whole model: small values that follow from their place.
void add(kvf_model* model, int weight, int layer, int first, int end, int k, int to) {
  std::vector<uint16_t> rows;
  for (int row = first; row < end; ++row) {
    std::minstd_rand values(static_cast<unsigned>((weight * 8 + layer) * 1000 + row + 1));
    for (int column = 0; column < k; ++column) {
      const unsigned value = static_cast<unsigned>(values());
      rows.push_back(static_cast<uint16_t>((0x3c00 + value % 0x280) | (value >> 16 & 1) << 15));
    }
  }
  CHECK(kvf_model_load(model, weight, layer, rows.data(), end - first, k, to) == KVF_OK);
}

struct Rank {
  kvf_shape shape;
  std::unique_ptr<kvf_model, Free> model;
  Memory cache;

  explicit Rank(const kvf_shape& of) : shape(of) {
    const std::vector<int32_t> windows = {0, 0};
    const std::vector<float> ones(static_cast<size_t>(shape.max_len * shape.head_dim / 2), 0.75f);
    int32_t error = 1;
    model.reset(kvf_model_create(&shape, windows.data(), ones.data(), ones.data(), &error));
    CHECK(model && error == KVF_OK);
    const auto part = [&](const kvf_range& range, int whole) { return shape.ranks == 0 ? kvf_range{0, whole} : range; };
    const kvf_range heads = part(shape.heads, shape.num_heads), kv = part(shape.kv_heads, shape.num_kv_heads);
    const kvf_range hidden = part(shape.hidden, shape.hidden_size), vocab = part(shape.vocab, shape.vocab_size);
    const kvf_range inner = part(shape.intermediate, shape.intermediate_size);
    const int dim = shape.head_dim, width = shape.hidden_size, keys = shape.num_heads * dim;
    const int values = keys + shape.num_kv_heads * dim, own = (heads.end - heads.begin) * dim;
    add(model.get(), KVF_EMBEDDING, 0, vocab.begin, vocab.end, width, 0);
    add(model.get(), KVF_NORM, 0, 0, width, 1, 0);
    if (!shape.tied) add(model.get(), KVF_HEAD, 0, vocab.begin, vocab.end, width, 0);
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      add(model.get(), KVF_INPUT_NORM, layer, 0, width, 1, 0);
      add(model.get(), KVF_POST_NORM, layer, 0, width, 1, 0);
      add(model.get(), KVF_QKV, layer, heads.begin * dim, heads.end * dim, width, 0);
      add(model.get(), KVF_QKV, layer, keys + kv.begin * dim, keys + kv.end * dim, width, own);
      add(model.get(), KVF_QKV, layer, values + kv.begin * dim, values + kv.end * dim, width,
          own + (kv.end - kv.begin) * dim);
      add(model.get(), KVF_OUTPUT, layer, hidden.begin, hidden.end, keys, 0);
      if (shape.output_bias) add(model.get(), KVF_OUTPUT_BIAS, layer, hidden.begin, hidden.end, 1, 0);
      add(model.get(), KVF_GATE, layer, inner.begin, inner.end, width, 0);
      add(model.get(), KVF_UP, layer, inner.begin, inner.end, width, 0);
      add(model.get(), KVF_DOWN, layer, hidden.begin, hidden.end, shape.intermediate_size, 0);
      if (shape.qk_norm) {
        add(model.get(), KVF_Q_NORM, layer, 0, dim, 1, 0);
        add(model.get(), KVF_K_NORM, layer, 0, dim, 1, 0);
      }
    }
    CHECK(kvf_model_finish(model.get()) == KVF_OK);
    cache = memory_of(kvf_cache_bytes(&shape, kBlocks), 0xff);  // NaN
    CHECK(kvf_model_set_cache(model.get(), cache.get(), kBlocks) == KVF_OK);
  }
};

// A prefill in two chunks, then single tokens; some steps want no logits, some all, some leave them to kvf_logits.
std::vector<float> walk(const Rank& rank, const std::vector<uint32_t>& tokens) {
  const std::vector<int32_t> table = {5, 2, 7, 0};
  const auto vocab = static_cast<size_t>(rank.shape.vocab_size);
  std::vector<float> all;
  for (int at = 0, step = 0; at < kTokens; ++step) {
    const int rows = step == 0 ? 13 : step == 1 ? 20 : 1;
    const int wanted = step == 0 ? KVF_NO_LOGITS : step == 1 ? KVF_ALL_LOGITS : KVF_LAST_LOGITS;
    const size_t count = wanted == KVF_NO_LOGITS ? 0 : wanted == KVF_ALL_LOGITS ? static_cast<size_t>(rows) : 1;
    std::vector<float> logits(count * vocab + 1);
    const kvf_sequence sequence{tokens.data() + at, table.data(), rows, at, 4, wanted};
    const bool later = step % 3 == 1;
    CHECK(kvf_step(rank.model.get(), &sequence, 1, later ? nullptr : logits.data()) == KVF_OK);
    if (later) CHECK(kvf_logits(rank.model.get(), 0, static_cast<int32_t>(count), logits.data()) == KVF_OK);
    all.insert(all.end(), logits.begin(), logits.begin() + static_cast<ptrdiff_t>(count * vocab));
    at += rows;
  }
  return all;
}

void run_ranks() {
  const int ranks = pick(2, 3);
  const kvf_shape shape = random_shape(ranks);
  std::vector<uint32_t> tokens;
  for (int i = 0; i < kTokens; ++i) tokens.push_back(static_cast<uint32_t>(pick(0, shape.vocab_size - 1)));
  const std::vector<float> expected = walk(Rank(shape), tokens);

  const kvf_shape first = of_rank(shape, ranks, 0);
  const Memory exchange = memory_of(kvf_shared_bytes(&first), 0);
  std::vector<Rank> all;
  for (int rank = 0; rank < ranks; ++rank) {
    all.emplace_back(of_rank(shape, ranks, rank));
    const kvf_sequence none{};
    CHECK(kvf_step(all.back().model.get(), &none, 0, nullptr) == KVF_E_STATE);  // it has not joined
    CHECK(kvf_model_join(all.back().model.get(), exchange.get()) == KVF_OK);
  }
  std::vector<float> found;
  std::vector<std::thread> others;
  for (int rank = 1; rank < ranks; ++rank) {
    others.emplace_back([&, rank] { walk(all[static_cast<size_t>(rank)], tokens); });
  }
  found = walk(all[0], tokens);
  for (std::thread& other : others) other.join();
  CHECK(found.size() == expected.size());
  CHECK(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0);
}

}  // namespace

int main() {
  source.seed(11);
  for (int i = 0; i < 12; ++i) run_ranks();
  std::puts("12 models");
  return 0;
}
