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
//
// So do all ranks of a split model. Each writes its own columns of the hidden states, of what attention returns and of
// what the MLP multiplies, and reads all columns: a stage that writes one of these ends with a barrier of all ranks. A
// column that a rank writes is read by the others only behind that barrier, and written again only behind the next one.
// Norms are computed by every rank for itself: that takes less than to wait once more.
class StepThread {
 public:
  StepThread(Model& model, float* logits, int thread)
      : model_(model),
        shape_(model.shape),
        work_(model.workspace),
        logits_(logits),
        thread_(thread),
        rows_(model.batch.rows()) {}

  void run() {
    embed();
    for (int layer = 0; layer < shape_.num_layers; ++layer) {
      const Layer& weights = model_.layers[static_cast<size_t>(layer)];
      norm(weights.input_norm);
      linear(weights.qkv, work_.normed, work_.qkv, 0, Epilogue::Store);
      end(KVF_STAGE_QKV);
      write_kv(layer);
      if (layer + 1 == shape_.num_layers) {
        // Nothing reads the other rows any more.
        rows_ = static_cast<int>(model_.batch.wanted.size());
        if (rows_ == 0) {
          end_for_all(KVF_STAGE_ROPE);  // the next step overwrites what others may still read
          return;
        }
      }
      attend(layer);
      linear(weights.output, work_.mixed, work_.hidden, shape_.hidden.begin, Epilogue::AddResidual);
      end_for_all(KVF_STAGE_OUTPUT);
      norm(weights.post_norm);
      linear(weights.gate_up, work_.normed, work_.activated, shape_.intermediate.begin, Epilogue::SiluMul);
      end_for_all(KVF_STAGE_GATE_UP);
      linear(weights.down, work_.activated, work_.hidden, shape_.hidden.begin, Epilogue::AddResidual);
      end_for_all(KVF_STAGE_DOWN);
    }
    norm(model_.norm);
    if (logits_ == nullptr) {  // `normed` keeps the wanted rows for run_head
      end_for_all(KVF_STAGE_NORM);
      return;
    }
    head(0, rows_);
  }

  // Logits of `count` wanted rows, from `first` on.
  void head(int first, int count) {
    if (!shape_.split()) {
      write_logits(first, count, logits_);
      return;
    }
    // Through the memory of all ranks, some rows at a time.
    for (int done = 0; done < count; done += Group::kLogitRows) {
      if (done > 0) end_for_all(KVF_STAGE_HEAD);  // the rows before have been copied
      const int rows = std::min(Group::kLogitRows, count - done);
      write_logits(first + done, rows, model_.group.logits);
      if (shape_.rank != 0) continue;
      const Range mine = split(rows, model_.threads.count(), thread_);
      const auto width = static_cast<size_t>(shape_.vocab_size);
      std::memcpy(logits_ + static_cast<size_t>(done + mine.begin) * width,
                  model_.group.logits + static_cast<size_t>(mine.begin) * width,
                  static_cast<size_t>(mine.size()) * width * sizeof(float));
    }
  }

 private:
  Range my_rows() const { return split(rows_, model_.threads.count(), thread_); }

  // This rank's threads have ended a stage.
  void end(int stage) {
    model_.threads.barrier(thread_);
    if (thread_ == 0) model_.stages.end(stage);
  }

  // All ranks have.
  void end_for_all(int stage) {
    model_.threads.barrier(thread_, [this] { model_.group.barrier(); });
    if (thread_ == 0) model_.stages.end(stage);
  }

  // Each row is written by the rank that has its token.
  void embed() {
    const Range mine = my_rows();
    for (int row = mine.begin; row < mine.end; ++row) {
      const uint32_t token = model_.batch.tokens[static_cast<size_t>(row)];
      const int place = static_cast<int>(token);
      if (place >= shape_.vocab.begin && place < shape_.vocab.end) model_.embed(token, work_.hidden.row(row));
    }
    end_for_all(KVF_STAGE_EMBED);
  }

  void norm(const bf16* weight) {
    const Range mine = my_rows();
    for (int row = mine.begin; row < mine.end; ++row) {
      rms_norm(work_.hidden.row(row), weight, shape_.rms_norm_eps, shape_.hidden_size, work_.normed.row(row));
    }
    end(KVF_STAGE_NORM);
  }

  // Into columns of y from `column` on.
  void linear(const Linear& weights, RowBuffer& x, RowBuffer& y, int column, Epilogue epilogue) {
    kvferry::linear(weights, x.row(0), x.stride(), rows_, y.row(0) + column, y.stride(), epilogue, model_.threads,
                    thread_);
  }

  // This rank's columns of `count` rows of logits, from `first` on.
  void write_logits(int first, int count, float* logits) {
    kvferry::linear(model_.head, work_.normed.row(first), work_.normed.stride(), count, logits + shape_.vocab.begin,
                    shape_.vocab_size, Epilogue::Logits, model_.threads, thread_);
    end_for_all(KVF_STAGE_HEAD);
  }

  // QK norm and rotation in place, then keys and values into their pages.
  void write_kv(int layer) {
    const Layer& weights = model_.layers[static_cast<size_t>(layer)];
    const Range mine = my_rows();
    for (int row = mine.begin; row < mine.end; ++row) {
      bf16* head = work_.qkv.row(row);
      for (int i = 0; i < shape_.own_heads() + shape_.own_kv_heads(); ++i, head += shape_.head_dim) {
        if (shape_.qk_norm) {
          const bf16* weight = i < shape_.own_heads() ? weights.q_norm : weights.k_norm;
          rms_norm(head, weight, shape_.rms_norm_eps, shape_.head_dim, head);
        }
        model_.rope.rotate(head, model_.batch.positions[static_cast<size_t>(row)]);
      }
    }
    for (const Segment& segment : model_.batch.segments) {
      const int begin = std::max(mine.begin, segment.row), end = std::min(mine.end, segment.row + segment.rows);
      for (int row = begin; row < end;) row += write_page(layer, segment, row, end);
    }
    end(KVF_STAGE_ROPE);
  }

  // The rows from `row` on, below `end`, that lie in one page. Returns how many.
  int write_page(int layer, const Segment& segment, int row, int end) {
    const int position = segment.position + row - segment.row, first = position % kPageTokens;
    const int count = std::min(end - row, kPageTokens - first);
    const size_t stride = static_cast<size_t>(work_.qkv.stride()) * sizeof(bf16);
    for (int head = 0; head < shape_.own_kv_heads(); ++head) {
      const bf16* key = work_.qkv.row(row) + (shape_.own_heads() + head) * shape_.head_dim;
      const bf16* value = key + shape_.own_kv_heads() * shape_.head_dim;
      bf16* page = model_.pages.keys(layer, head, segment.block_table, position);
      store_keys(page, shape_.head_dim, first, count, reinterpret_cast<const std::byte*>(key), stride);
      store_values(model_.pages.values_of(page), shape_.head_dim, first, count,
                   reinterpret_cast<const std::byte*>(value), stride);
    }
    return count;
  }

  // Moves this rank's columns of the wanted rows' hidden states to the front. They rise, so none is overwritten before
  // it moved. Nobody else reads them between the last layer's attention and its output.
  void keep_wanted() {
    const std::vector<int>& wanted = model_.batch.wanted;
    for (int i = 0; i < static_cast<int>(wanted.size()); ++i) {
      const int row = wanted[static_cast<size_t>(i)];
      if (row == i) continue;
      std::memcpy(work_.hidden.row(i) + shape_.hidden.begin, work_.hidden.row(row) + shape_.hidden.begin,
                  static_cast<size_t>(shape_.own_hidden()) * sizeof(bf16));
    }
  }

  void attend(int layer) {
    const AttentionCall call{&model_.pages,
                             layer,
                             model_.layers[static_cast<size_t>(layer)].window,
                             shape_.own_kv_heads(),
                             shape_.own_group(),
                             shape_.head_dim,
                             1.0f / std::sqrt(static_cast<float>(shape_.head_dim)),
                             work_.qkv.row(0),
                             work_.qkv.stride(),
                             work_.mixed.row(0) + shape_.heads.begin * shape_.head_dim,
                             work_.mixed.stride()};
    const bool last = layer + 1 == shape_.num_layers;
    attention(call, last ? model_.batch.drawing : model_.batch.segments, model_.threads, thread_);
    end_for_all(KVF_STAGE_ATTENTION);
    if (!last) return;
    if (thread_ == 0) keep_wanted();
    end(KVF_STAGE_ATTENTION);
  }

  Model& model_;
  const Shape& shape_;
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

void run_head(Model& model, int first, int count, float* logits) {
  model.stages.begin();
  model.threads.run([&](int thread) { StepThread(model, logits, thread).head(first, count); });
}

}  // namespace kvferry
