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

struct kvf_model : kvferry::Model {
  using kvferry::Model::Model;
};

namespace {

using kvferry::Pages;
using kvferry::Shape;

constexpr uintptr_t kCacheAlignment = 64;

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

int32_t check_transfer(const kvf_model* model, const kvf_piece* piece, const int32_t* block_table, int32_t num_blocks,
                       const void* frame, uint64_t frame_bytes) {
  if (model == nullptr || piece == nullptr || frame == nullptr) return KVF_E_ARGUMENT;
  if (model->pages.num_blocks() == 0) return KVF_E_STATE;
  if (const int32_t error = kvferry::check_piece(model->shape, *piece); error != KVF_OK) return error;
  if (frame_bytes != kvferry::piece_bytes(model->shape, *piece)) return KVF_E_SHAPE;
  return kvferry::check_table(model->shape, model->pages.num_blocks(), block_table, num_blocks, piece->token_start,
                              piece->token_end);
}

}  // namespace

extern "C" {

const char* kvf_isa(void) { return kvferry::Isa::kName; }

uint32_t kvf_abi(void) { return KVF_ABI; }

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
    model = std::make_unique<kvf_model>(Shape{*shape}, windows, cos, sin);
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
  return Pages::bytes(Shape{*shape}, num_blocks);
}

int32_t kvf_model_set_cache(kvf_model* model, void* memory, int32_t num_blocks) {
  if (model == nullptr || memory == nullptr || num_blocks < 1 ||
      reinterpret_cast<uintptr_t>(memory) % kCacheAlignment != 0) {
    return KVF_E_ARGUMENT;
  }
  model->pages = Pages(model->shape, static_cast<kvferry::bf16*>(memory), num_blocks);
  return KVF_OK;
}

int32_t kvf_step(kvf_model* model, const kvf_sequence* sequences, int32_t num_sequences, float* logits) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  if (!model->finished || model->pages.num_blocks() == 0) return KVF_E_STATE;
  return guarded([&]() -> int32_t {
    const int32_t error = kvferry::make_batch(model->shape, model->pages.num_blocks(), sequences, num_sequences,
                                              model->batch);
    if (error != KVF_OK) return error;
    if (logits == nullptr && !model->batch.wanted.empty()) return KVF_E_ARGUMENT;
    model->workspace.reserve(model->batch.rows());
    kvferry::run_step(*model, logits);
    return KVF_OK;
  });
}

int32_t kvf_gather(const kvf_model* model, const kvf_piece* piece, const int32_t* block_table, int32_t num_blocks,
                   void* frame, uint64_t frame_bytes) {
  const int32_t error = check_transfer(model, piece, block_table, num_blocks, frame, frame_bytes);
  if (error != KVF_OK) return error;
  kvferry::gather(model->shape, model->pages, *piece, block_table, static_cast<std::byte*>(frame));
  return KVF_OK;
}

int32_t kvf_scatter(const kvf_model* model, const kvf_piece* piece, const int32_t* block_table, int32_t num_blocks,
                    const void* frame, uint64_t frame_bytes) {
  const int32_t error = check_transfer(model, piece, block_table, num_blocks, frame, frame_bytes);
  if (error != KVF_OK) return error;
  kvferry::scatter(model->shape, model->pages, *piece, block_table, static_cast<const std::byte*>(frame));
  return KVF_OK;
}

int32_t kvf_copy_blocks(const kvf_model* model, const int32_t* pairs, int32_t count) {
  if (model == nullptr || count < 0 || (count > 0 && pairs == nullptr)) return KVF_E_ARGUMENT;
  const int num_blocks = model->pages.num_blocks();
  if (num_blocks == 0) return KVF_E_STATE;
  for (int64_t i = 0; i < 2 * int64_t{count}; ++i) {
    if (pairs[i] < 0 || pairs[i] >= num_blocks) return KVF_E_BLOCK;
  }
  for (int64_t i = 0; i < count; ++i) model->pages.copy_block(pairs[2 * i], pairs[2 * i + 1]);
  return KVF_OK;
}

int32_t kvf_model_sample(kvf_model* model, const float* logits, int32_t num_draws, const kvf_draw* draws,
                         uint32_t* tokens) {
  if (model == nullptr) return KVF_E_ARGUMENT;
  return guarded([&]() -> int32_t {
    const int32_t vocab_size = model->shape.vocab_size;
    const int32_t error = kvferry::check_draws(logits, num_draws, vocab_size, draws, tokens);
    if (error != KVF_OK || num_draws == 0) return error;
    const auto count = static_cast<size_t>(model->threads.count());
    while (model->sampling.size() < count) {
      model->sampling.push_back(kvferry::make_aligned<std::byte>(kvf_sample_scratch_bytes(vocab_size)));
    }
    const auto draw = [&](int thread, kvferry::Range rows) {
      kvferry::draw_rows(logits, rows.begin, rows.end, vocab_size, draws,
                         model->sampling[static_cast<size_t>(thread)].get(), tokens);
    };
    if (num_draws < 2 * model->threads.count()) {  // to wake the others takes as long as a few draws
      draw(0, {0, num_draws});
    } else {
      model->threads.run([&](int thread) { draw(thread, kvferry::split(num_draws, model->threads.count(), thread)); });
    }
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
