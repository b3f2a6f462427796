#include "logprobs.h"

#include <cmath>
#include <limits>

#include "draw_weights.h"
#include "lanes.h"

namespace kvferry {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint64_t sum(const int32_t *weights, int32_t count) {
    uint64_t total = 0;
    for (int32_t i = 0; i < count; ++i) total += static_cast<uint32_t>(weights[i]);
    return total;
}

int32_t count_at_least(const float *logits, int32_t count, float bound) {
    Ints counts{};
    int32_t i = 0;
    for (; i + kVectorFloats <= count; i += kVectorFloats) counts -= load_floats(logits + i) >= bound;
    int32_t total = 0;
    for (int lane = 0; lane < kVectorFloats; ++lane) total += counts[lane];
    for (; i < count; ++i) total += logits[i] >= bound;
    return total;
}

// The `wanted` best of `logits`, by (logit descending, id ascending). NaN counts as -inf.
void find_top(const float *logits, int32_t count, int32_t wanted, uint32_t *tokens, float *values) {
    int32_t num_found = 0;
    const auto offer = [&](int32_t i) {
        const float logit = std::isnan(logits[i]) ? -kInfinity : logits[i];
        if (num_found == wanted && !(logit > values[wanted - 1])) return;
        int32_t place = num_found < wanted ? num_found++ : wanted - 1;
        for (; place > 0 && logit > values[place - 1]; --place) {
            values[place] = values[place - 1];
            tokens[place] = tokens[place - 1];
        }
        values[place] = logit;
        tokens[place] = static_cast<uint32_t>(i);
    };
    int32_t i = 0;
    for (; i + kVectorFloats <= count; i += kVectorFloats) {
        // Few vectors hold anything better than what was found so far.
        if (num_found == wanted && bits_of(load_floats(logits + i) > values[wanted - 1]) == 0) continue;
        for (int lane = 0; lane < kVectorFloats; ++lane) offer(i + lane);
    }
    for (; i < count; ++i) offer(i);
}

}  // namespace

void find_logprobs(const float *logits, int32_t vocab_size, uint32_t token, int32_t num_top,
                   int32_t *weights, kvf_logprobs *out) {
    const float best = largest(logits, vocab_size);
    // A row without a finite best has no distribution: its log-probabilities are NaN.
    double norm = std::numeric_limits<double>::quiet_NaN();
    if (std::isfinite(best)) {
        weigh(logits, vocab_size, best, 0x1.715476p+0f /* log2 e */, 0, weights);
        norm = std::log(static_cast<double>(sum(weights, vocab_size)) / kWeightOne) + static_cast<double>(best);
    }
    out->logprob = static_cast<float>(static_cast<double>(logits[token]) - norm);
    const int32_t rank = count_at_least(logits, vocab_size, logits[token]);
    out->rank = rank > 0 ? rank : 1;  // a NaN is not at least itself
    if (num_top == 0) return;
    find_top(logits, vocab_size, num_top, out->top_tokens, out->top_logprobs);
    for (int32_t i = 0; i < num_top; ++i)
        out->top_logprobs[i] = static_cast<float>(static_cast<double>(out->top_logprobs[i]) - norm);
}

}  // namespace kvferry
