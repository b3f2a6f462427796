// One engine step: all layers over all rows of a batch.
#pragma once

#include "model.h"

namespace kvferry {

// Runs model.batch, made and checked for this model, whose workspace has room for its rows. Writes the KV of all rows,
// and the logits [wanted rows, vocab_size] of those that want them, unless `logits` is null. Can't fail.
void run_step(Model& model, float* logits);

// Logits [count, vocab_size] of the wanted rows [first, first + count) of the last step.
void run_head(Model& model, int first, int count, float* logits);

}  // namespace kvferry
