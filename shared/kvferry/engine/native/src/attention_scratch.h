// Scratch memory of one attention tile.
#pragma once

#include <cstddef>

#include "attention_step.h"
#include "attention_tile.h"

namespace kvferry {

// Row r's parts begin at index r * (their size).
struct AttentionScratch {
  bf16* queries;        // [Dp / 2][rows] pairs; on tile registers [rows][Dp]
  float* outputs;       // [rows][Dp], not yet divided by the total
  float* scores;        // [rows][kStepPositions]
  bf16* probabilities;  // [rows][kStepPositions]
  float* totals;        // [rows][W]: sums of probabilities by lane
  float* maxima;        // [rows]: the largest score so far, as a power of two
  bf16* patched;        // a page of values with one position of a pair made zero; on tile registers a step's pages
  float* sums;          // [rows][Dp], on tile registers: of one step

  static constexpr int kPatchedPages = Isa::kTiles ? kStepPages : 1;

  AttentionScratch(std::byte* memory, int rows, int padded_dim) {
    const auto take = [&memory](size_t bytes) {
      std::byte* taken = memory;
      memory += (bytes + 63) / 64 * 64;
      return taken;
    };
    const auto count = static_cast<size_t>(rows), dim = static_cast<size_t>(padded_dim);
    queries = reinterpret_cast<bf16*>(take(count * dim * sizeof(bf16)));
    outputs = reinterpret_cast<float*>(take(count * dim * sizeof(float)));
    scores = reinterpret_cast<float*>(take(count * kStepPositions * sizeof(float)));
    probabilities = reinterpret_cast<bf16*>(take(count * kStepPositions * sizeof(bf16)));
    totals = reinterpret_cast<float*>(take(count * Isa::kLanes * sizeof(float)));
    maxima = reinterpret_cast<float*>(take(count * sizeof(float)));
    patched = reinterpret_cast<bf16*>(take(dim * kPatchedPages * kPageTokens * sizeof(bf16)));
    sums = reinterpret_cast<float*>(take(Isa::kTiles ? count * dim * sizeof(float) : 0));
  }
};

// Bytes that a tile of the most rows takes, aligned to 64.
constexpr size_t attention_scratch_bytes(int padded_dim) {
  const auto dim = static_cast<size_t>(padded_dim);
  constexpr auto rows = static_cast<size_t>(kMaxAttentionRows);
  const size_t row = dim * (sizeof(bf16) + (Isa::kTiles ? 2 : 1) * sizeof(float)) + kStepPositions * (sizeof(float) + sizeof(bf16)) +
                     (Isa::kLanes + 1) * sizeof(float);
  return rows * row + dim * AttentionScratch::kPatchedPages * kPageTokens * sizeof(bf16) + 8 * 64;
}
static_assert(attention_scratch_bytes(KVF_MAX_HEAD_DIM) <= Threads::kScratchBytes);

}  // namespace kvferry
