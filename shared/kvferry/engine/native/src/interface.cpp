// The C interface: checks arguments, and turns exceptions into codes.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>

#include "batch.h"
#include "draw_rows.h"
#include "isa.h"
#include "kvferry.h"
#include "model.h"
#include "piece.h"
#include "step.h"
#include "tile.h"

struct kvf_model : kvferry::Model {
  using kvferry::Model::Model;
};

namespace {

using kvferry::Pages;
using kvferry::Shape;

constexpr uintptr_t kAlignment = 64;  // of memory that the caller gives

// The code that `work` returns, or that of what it throws.
template <typename Work>
int32_t guarded(Work&& work) noexcept {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return KVF_E_MEMORY;
  } catch (const std::system_error&) {  // a thread could not be started
    return KVF_E_MEMORY;
  } catch (...) {
    return KVF_E_STATE;
  }
}

// KVF_OK if there is memory of this shape.
int32_t check_cache(const kvf_cache* cache) {
  if (cache == nullptr || cache->shape == nullptr || cache->memory == nullptr || cache->num_blocks < 1 ||
      reinterpret_cast<uintptr_t>(cache->memory) % kAlignment != 0) {
    return KVF_E_ARGUMENT;
  }
  return kvferry::check_shape(*cache->shape);
}

// Whether two caches are of one model, as far as frames show it.
bool same_rows(const kvf_shape& left, const kvf_shape& right) {
  return left.head_dim == right.head_dim && left.block_size == right.block_size;
}

Pages pages_of(const kvf_cache& cache) {
  return Pages(Shape(*cache.shape), static_cast<kvferry::bf16*>(cache.memory), cache.num_blocks);
}

int32_t check_part(const kvf_cache& cache, const kvf_piece& piece, const int32_t* block_table, int32_t num_blocks,
                   uint64_t frame_bytes) {
  if (const int32_t error = check_cache(&cache); error != KVF_OK) return error;
  const Shape shape(*cache.shape);
  if (const int32_t error = kvferry::check_piece(shape, piece); error != KVF_OK) return error;
  if (frame_bytes != kvferry::piece_bytes(shape, piece)) return KVF_E_SHAPE;
  return kvferry::check_table(shape, cache.num_blocks, block_table, num_blocks, piece.token_start, piece.token_end);
}

// Calls copy(shape, parts) if all of it may be copied.
template <typename Copy>
int32_t transfer(const kvf_cache* caches, const kvf_piece* pieces, int32_t count, const int32_t* block_table,
                 int32_t num_blocks, const void* frame, uint64_t frame_bytes, Copy&& copy) {
  if (caches == nullptr || pieces == nullptr || frame == nullptr || count < 1 || count > KVF_MAX_RANKS) {
    return KVF_E_ARGUMENT;
  }
  return guarded([&]() -> int32_t {
    std::vector<kvferry::Part> parts;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t error = check_part(caches[i], pieces[i], block_table, num_blocks, frame_bytes);
      if (error != KVF_OK) return error;
      if (!kvferry::same_frame(pieces[0], pieces[i]) || !same_rows(*caches[0].shape, *caches[i].shape)) {
        return KVF_E_SHAPE;
      }
      parts.push_back({pages_of(caches[i]), pieces[i]});
    }
    copy(Shape(*caches[0].shape), parts);
    return KVF_OK;
  });
}

// Calls work(rows, scratch) for all of `count` rows, on as many of the model's threads as they are worth. `scratch` is as
// kvf_sample wants it. Throws std::bad_alloc.
template <typename Work>
void share_rows(kvf_model& model, int count, Work&& work) {
  const int num_threads = model.threads.count();
  while (model.sampling.size() < static_cast<size_t>(num_threads)) {
    model.sampling.push_back(kvferry::make_aligned<std::byte>(kvf_sample_scratch_bytes(model.shape.vocab_size)));
  }
  const auto share = [&](int thread, kvferry::Range rows) {
    work(rows, model.sampling[static_cast<size_t>(thread)].get());
  };
  if (count < 2 * num_threads) {  // to wake the others takes as long as a few rows
    share(0, {0, count});
  } else {
    model.threads.run([&](int thread) { share(thread, kvferry::split(count, num_threads, thread)); });
  }
}

}  // namespace

extern "C" {

const char* kvf_isa(void) { return kvferry::Isa::kName; }

uint32_t kvf_abi(void) { return KVF_ABI; }

int32_t kvf_may_run(void) { return kvferry::may_use_tiles() ? 1 : 0; }

const char* kvf_error_text(int32_t code) {
  switch (code) {
    case KVF_OK: return "no error";
    case KVF_E_ARGUMENT: return "an argument is missing or outside its bounds";
    case KVF_E_SHAPE: return "a shape that the engine can't run, or that does not fit";
    case KVF_E_STATE: return "called out of order";
    case KVF_E_MISSING: return "a weight was not loaded whole";
    case KVF_E_MEMORY: return "out of memory or threads";
    case KVF_E_EMPTY: return "a sequence without rows or a piece without content";
    case KVF_E_POSITION: return "positions beyond max_len or the block table";
    case KVF_E_BLOCK: return "a block outside the cache";
    case KVF_E_TOKEN: return "a token outside the vocabulary";
    default: return "an unknown error";
  }
}

kvf_model* kvf_model_create(const kvf_shape* shape, const int32_t* windows, const float* cos, const float* sin,
                            int32_t* error) {
  std::unique_ptr<kvf_model> model;
  const int32_t code = guarded([&]() -> int32_t {
    if (shape == nullptr || windows == nullptr || cos == nullptr || sin == nullptr) return KVF_E_ARGUMENT;
    if (const int32_t wrong = kvferry::check_shape(*shape); wrong != KVF_OK) return wrong;
    for (int32_t layer = 0; layer < shape->num_layers; ++layer) {
      if (windows[layer] < 0) return KVF_E_ARGUMENT;
    }
    if (!kvferry::may_use_tiles()) return KVF_E_STATE;
    model = std::make_unique<kvf_model>(Shape(*shape), windows, cos, sin);
    return KVF_OK;
  });
  if (error != nullptr) *error = code;
  return model.release();
}

int32_t kvf_model_load(kvf_model* model, int32_t weight, int32_t layer, const uint16_t* rows, int32_t n, int32_t k,
                       int32_t first_row) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  return guarded(
      [&] { return model->load(weight, layer, reinterpret_cast<const kvferry::bf16*>(rows), n, k, first_row); });
}

int32_t kvf_model_finish(kvf_model* model) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  return guarded([&] { return model->finish(); });
}

void kvf_model_free(kvf_model* model) { delete model; }

uint64_t kvf_model_weight_bytes(const kvf_model* model) { return model == nullptr ? 0 : model->weight_bytes; }

uint64_t kvf_model_workspace_bytes(const kvf_model* model) {
  if (model == nullptr) return 0;
  return model->workspace.bytes() + static_cast<uint64_t>(model->threads.count()) * kvferry::Threads::kScratchBytes +
         model->sampling.size() * kvf_sample_scratch_bytes(model->shape.vocab_size);
}

uint64_t kvf_cache_bytes(const kvf_shape* shape, int32_t num_blocks) {
  if (shape == nullptr || num_blocks < 1 || kvferry::check_shape(*shape) != KVF_OK) return 0;
  return Pages::bytes(Shape(*shape), num_blocks);
}

int32_t kvf_model_set_cache(kvf_model* model, void* memory, int32_t num_blocks) {
  if (model == nullptr || memory == nullptr || num_blocks < 1 ||
      reinterpret_cast<uintptr_t>(memory) % kAlignment != 0) {
    return KVF_E_ARGUMENT;
  }
  model->pages = Pages(model->shape, static_cast<kvferry::bf16*>(memory), num_blocks);
  return KVF_OK;
}

uint64_t kvf_shared_bytes(const kvf_shape* shape) {
  if (shape == nullptr || kvferry::check_shape(*shape) != KVF_OK) return 0;
  return kvferry::Group::bytes(Shape(*shape));
}

int32_t kvf_model_join(kvf_model* model, void* memory) {
  if (model == nullptr || memory == nullptr || reinterpret_cast<uintptr_t>(memory) % kAlignment != 0) {
    return KVF_E_ARGUMENT;
  }
  if (!model->shape.split() || model->group.joined()) return KVF_E_STATE;
  model->join(static_cast<std::byte*>(memory));
  return KVF_OK;
}

int32_t kvf_barrier(void* state, int32_t ranks) {
  if (state == nullptr || ranks < 1 || ranks > KVF_MAX_RANKS || reinterpret_cast<uintptr_t>(state) % kAlignment != 0) {
    return KVF_E_ARGUMENT;
  }
  kvferry::Group(ranks, static_cast<std::byte*>(state)).barrier();
  return KVF_OK;
}

int32_t kvf_step(kvf_model* model, const kvf_sequence* sequences, int32_t num_sequences, float* logits) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  if (!model->finished || model->pages.num_blocks() == 0) return KVF_E_STATE;
  if (model->shape.split() && !model->group.joined()) return KVF_E_STATE;
  model->num_kept = 0;
  return guarded([&]() -> int32_t {
    const int32_t error = kvferry::make_batch(model->shape, model->pages.num_blocks(), sequences, num_sequences,
                                              model->batch);
    if (error != KVF_OK) return error;
    if (model->shape.split() && model->batch.rows() > model->shape.max_rows) return KVF_E_ARGUMENT;
    model->workspace.reserve(model->batch.rows());
    kvferry::run_step(*model, logits);
    model->num_kept = static_cast<int>(model->batch.wanted.size());
    return KVF_OK;
  });
}

int32_t kvf_logits(kvf_model* model, int32_t first, int32_t count, float* logits) {
  if (model == nullptr || first < 0 || count < 0) return KVF_E_ARGUMENT;
  if (int64_t{first} + count > model->num_kept) return KVF_E_STATE;
  if (count == 0) return KVF_OK;
  if (logits == nullptr) return KVF_E_ARGUMENT;
  kvferry::run_head(*model, first, count, logits);
  return KVF_OK;
}

int32_t kvf_gather(const kvf_cache* caches, const kvf_piece* pieces, int32_t count, const int32_t* block_table,
                   int32_t num_blocks, void* frame, uint64_t frame_bytes) {
  return transfer(caches, pieces, count, block_table, num_blocks, frame, frame_bytes,
                  [&](const Shape& shape, const std::vector<kvferry::Part>& parts) {
                    kvferry::gather(shape, parts, block_table, static_cast<std::byte*>(frame));
                  });
}

int32_t kvf_scatter(const kvf_cache* caches, const kvf_piece* pieces, int32_t count, const int32_t* block_table,
                    int32_t num_blocks, const void* frame, uint64_t frame_bytes) {
  return transfer(caches, pieces, count, block_table, num_blocks, frame, frame_bytes,
                  [&](const Shape& shape, const std::vector<kvferry::Part>& parts) {
                    kvferry::scatter(shape, parts, block_table, static_cast<const std::byte*>(frame));
                  });
}

int32_t kvf_copy_blocks(const kvf_cache* cache, const int32_t* pairs, int32_t count) {
  if (count < 0 || (count > 0 && pairs == nullptr)) return KVF_E_ARGUMENT;
  if (const int32_t error = check_cache(cache); error != KVF_OK) return error;
  for (int64_t i = 0; i < 2 * int64_t{count}; ++i) {
    if (pairs[i] < 0 || pairs[i] >= cache->num_blocks) return KVF_E_BLOCK;
  }
  const Pages pages = pages_of(*cache);
  for (int64_t i = 0; i < count; ++i) pages.copy_block(pairs[2 * i], pairs[2 * i + 1]);
  return KVF_OK;
}

int32_t kvf_model_sample(kvf_model* model, const float* logits, int32_t num_draws, const kvf_draw* draws,
                         uint32_t* tokens) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  return guarded([&]() -> int32_t {
    const int32_t vocab_size = model->shape.vocab_size;
    const int32_t error = kvferry::check_draws(logits, num_draws, vocab_size, draws, tokens);
    if (error != KVF_OK || num_draws == 0) return error;
    share_rows(*model, num_draws, [&](kvferry::Range rows, void* scratch) {
      kvferry::draw_rows(logits, rows.begin, rows.end, vocab_size, draws, scratch, tokens);
    });
    return KVF_OK;
  });
}

int32_t kvf_model_score(kvf_model* model, const float* logits, int32_t num_rows, const uint32_t* targets,
                        int32_t num_top, kvf_logprobs* logprobs) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  return guarded([&]() -> int32_t {
    const int32_t vocab_size = model->shape.vocab_size;
    const int32_t error = kvferry::check_scores(logits, num_rows, vocab_size, targets, num_top, logprobs);
    if (error != KVF_OK || num_rows == 0) return error;
    share_rows(*model, num_rows, [&](kvferry::Range rows, void* scratch) {
      kvferry::score_rows(logits, rows.begin, rows.end, vocab_size, targets, num_top, scratch, logprobs);
    });
    return KVF_OK;
  });
}

int32_t kvf_model_profile(kvf_model* model, double* seconds) {
  if (model == nullptr || seconds == nullptr) return KVF_E_ARGUMENT;
  model->stages.enabled = true;
  const auto taken = model->stages.take();
  std::copy(taken.begin(), taken.end(), seconds);
  return KVF_OK;
}

}  // extern "C"
