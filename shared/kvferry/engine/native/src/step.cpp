#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "gemm.h"
#include "norm.h"

namespace kvferry {
namespace {

// What one thread does in a step. All threads walk through the same stages; within a stage, rows or outputs are split
// between them, and a barrier ends it.
class StepThread {
 public:
  StepThread(Model& model, float* logits, int thread)
      : model_(model), work_(model.workspace), logits_(logits), thread_(thread), rows_(model.batch.rows()) {}

  void run() {
    embed();
    for (int layer = 0; layer < model_.shape.num_layers; ++layer) {
      const Layer& weights = model_.layers[static_cast<size_t>(layer)];
      norm(weights.input_norm);
      linear(weights.qkv, work_.normed, work_.qkv, Epilogue::Store, KVF_STAGE_QKV);
      write_kv(layer);
      if (layer + 1 == model_.shape.num_layers) {
        // Nothing reads the other rows any more.
        rows_ = static_cast<int>(model_.batch.wanted.size());
        if (rows_ == 0) return;
      }
      attend(layer);
      linear(weights.output, work_.mixed, work_.hidden, Epilogue::AddResidual, KVF_STAGE_OUTPUT);
      norm(weights.post_norm);
      linear(weights.gate_up, work_.normed, work_.activated, Epilogue::SiluMul, KVF_STAGE_GATE_UP);
      linear(weights.down, work_.activated, work_.hidden, Epilogue::AddResidual, KVF_STAGE_DOWN);
    }
    norm(model_.norm);
    kvferry::linear(model_.head, work_.normed.row(0), work_.normed.stride(), rows_, logits_, model_.shape.vocab_size,
                    Epilogue::Logits, model_.threads, thread_);
    end(KVF_STAGE_HEAD);
  }

 private:
  Range my_rows() const { return split(rows_, model_.threads.count(), thread_); }

  void end(int stage) {
    model_.threads.barrier(thread_);
    if (thread_ == 0) model_.stages.end(stage);
  }

  void embed() {
    const Range mine = my_rows();
    for (int row = mine.begin; row < mine.end; ++row) {
      model_.embed(model_.batch.tokens[static_cast<size_t>(row)], work_.hidden.row(row));
    }
    end(KVF_STAGE_EMBED);
  }

  void norm(const bf16* weight) {
    const Range mine = my_rows();
    for (int row = mine.begin; row < mine.end; ++row) {
      rms_norm(work_.hidden.row(row), weight, model_.shape.rms_norm_eps, model_.shape.hidden_size,
               work_.normed.row(row));
    }
    end(KVF_STAGE_NORM);
  }

  void linear(const Linear& weights, RowBuffer& x, RowBuffer& y, Epilogue epilogue, int stage) {
    kvferry::linear(weights, x.row(0), x.stride(), rows_, y.row(0), y.stride(), epilogue, model_.threads, thread_);
    end(stage);
  }

  // QK norm and rotation in place, then keys and values into their pages.
  void write_kv(int layer) {
    const Layer& weights = model_.layers[static_cast<size_t>(layer)];
    const Shape& shape = model_.shape;
    const Range mine = my_rows();
    for (int row = mine.begin; row < mine.end; ++row) {
      bf16* head = work_.qkv.row(row);
      for (int i = 0; i < shape.num_heads + shape.num_kv_heads; ++i, head += shape.head_dim) {
        if (shape.qk_norm) {
          const bf16* weight = i < shape.num_heads ? weights.q_norm : weights.k_norm;
          rms_norm(head, weight, shape.rms_norm_eps, shape.head_dim, head);
        }
        model_.rope.rotate(head, model_.batch.positions[static_cast<size_t>(row)]);
      }
    }
    for (const Segment& segment : model_.batch.segments) {
      const int begin = std::max(mine.begin, segment.row), end = std::min(mine.end, segment.row + segment.rows);
      for (int row = begin; row < end;) row += write_page(layer, segment, row, end);
    }
    if (layer + 1 == shape.num_layers && thread_ == 0) keep_wanted();
    end(KVF_STAGE_ROPE);
  }

  // The rows from `row` on, below `end`, that lie in one page. Returns how many.
  int write_page(int layer, const Segment& segment, int row, int end) {
    const Shape& shape = model_.shape;
    const int position = segment.position + row - segment.row, first = position % kPageTokens;
    const int count = std::min(end - row, kPageTokens - first);
    const size_t stride = static_cast<size_t>(work_.qkv.stride()) * sizeof(bf16);
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const bf16* key = work_.qkv.row(row) + shape.query_size() + head * shape.head_dim;
      const bf16* value = key + shape.num_kv_heads * shape.head_dim;
      bf16* page = model_.pages.keys(layer, head, segment.block_table, position);
      store_keys(page, shape.head_dim, first, count, reinterpret_cast<const std::byte*>(key), stride);
      store_values(model_.pages.values_of(page), shape.head_dim, first, count,
                   reinterpret_cast<const std::byte*>(value), stride);
    }
    return count;
  }

  // Moves the hidden states of the wanted rows to the front. They rise, so none is overwritten before it moved.
  void keep_wanted() {
    const std::vector<int>& wanted = model_.batch.wanted;
    for (int i = 0; i < static_cast<int>(wanted.size()); ++i) {
      const int row = wanted[static_cast<size_t>(i)];
      if (row == i) continue;
      std::memcpy(work_.hidden.row(i), work_.hidden.row(row),
                  static_cast<size_t>(model_.shape.hidden_size) * sizeof(bf16));
    }
  }

  void attend(int layer) {
    const Shape& shape = model_.shape;
    const AttentionCall call{&model_.pages,
                             layer,
                             model_.layers[static_cast<size_t>(layer)].window,
                             shape.num_kv_heads,
                             shape.group(),
                             shape.head_dim,
                             1.0f / std::sqrt(static_cast<float>(shape.head_dim)),
                             work_.qkv.row(0),
                             work_.qkv.stride(),
                             work_.mixed.row(0),
                             work_.mixed.stride()};
    const bool last = layer + 1 == shape.num_layers;
    attention(call, last ? model_.batch.drawing : model_.batch.segments, model_.threads, thread_);
    end(KVF_STAGE_ATTENTION);
  }

  Model& model_;
  Workspace& work_;
  float* logits_;
  int thread_;
  int rows_;  // of the stages' buffers
};

}  // namespace

void run_step(Model& model, float* logits) {
  if (model.batch.rows() == 0) return;
  model.stages.begin();
  model.threads.run([&](int thread) { StepThread(model, logits, thread).run(); });
}

}  // namespace kvferry
