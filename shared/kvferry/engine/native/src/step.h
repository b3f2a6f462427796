// One engine step: all layers over all rows of a batch.
#pragma once

#include "model.h"

namespace kvferry {

// Runs model.batch, made and checked for this model, whose workspace has room for its rows. Writes the KV of all rows,
// and the logits [wanted rows, vocab_size] of those that want them. Can't fail.
void run_step(Model& model, float* logits);

}  // namespace kvferry
