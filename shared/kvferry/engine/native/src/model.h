// The weights of a model, packed as they arrive, and what a step needs beside them.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "arena.h"
#include "batch.h"
#include "group.h"
#include "pack.h"
#include "pages.h"
#include "rope.h"
#include "shape.h"
#include "stages.h"
#include "threads.h"
#include "workspace.h"

namespace kvferry {

struct Layer {
  int window;  // attended positions, the own one included; 0: all
  bf16* input_norm;
  Linear qkv;
  bf16* q_norm;  // nullptr without QK norm
  bf16* k_norm;
  Linear output;
  bf16* post_norm;
  Linear gate_up;
  Linear down;
};

class Model {
 public:
  // The arguments are checked. Throws std::bad_alloc or std::system_error.
  Model(const Shape& shape, const int32_t* windows, const float* cos, const float* sin);

  int32_t load(int32_t weight, int32_t layer, const bf16* rows, int32_t n, int32_t k, int32_t first_row);
  // After this, steps may run and nothing can be loaded.
  int32_t finish();

  // Ranks: exchange rows through this memory from now on.
  void join(std::byte* memory);

  // Row `token` of the embedding, hidden_size values. The token must be one of this rank's.
  void embed(uint32_t token, bf16* out) const;

  const Shape shape;
  Threads threads;
  const RopeTable rope;
  std::vector<Layer> layers;
  bf16* norm;   // of the last hidden states
  Linear head;
  uint64_t weight_bytes = 0;
  bool finished = false;

  Pages pages;  // without blocks until the cache is set
  Group group;
  Workspace workspace;
  std::vector<Aligned<std::byte>> sampling;  // scratch memory of each thread, made by the first draws
  Batch batch;
  int num_kept = 0;  // wanted rows of the last step, whose last hidden states are in the workspace
  Stages stages;

 private:
  // One weight, as the caller names it.
  struct Slot {
    int n = 0, k = 0;          // [n, k] of the whole; n is 0 if the model has no such weight
    bf16* plain = nullptr;     // norms, and an embedding that is not the head
    Linear* linear = nullptr;  // packed: rows, or a bias
    bool bias = false;
    int offset = 0;            // of its row 0 in the linear's rows
    std::vector<bool> loaded;  // [n]
  };

  Slot& slot(int32_t weight, int32_t layer) {
    return slots_[static_cast<size_t>(layer) * KVF_NUM_WEIGHTS + static_cast<size_t>(weight)];
  }
  void add_plain(int32_t weight, int32_t layer, int n, int k, bf16*& memory);
  void add_rows(int32_t weight, int32_t layer, Linear& linear, int n, int offset);
  void add_bias(int32_t weight, int32_t layer, Linear& linear, int n, int offset);
  Linear make(int n, int k, bool gated, bool biased);

  Arena arena_;
  bf16* embedding_ = nullptr;  // [own vocab, hidden]; nullptr if tied
  std::vector<Slot> slots_;    // [layers][KVF_NUM_WEIGHTS]
};

}  // namespace kvferry
