#include "penalties.h"

#include <cstring>
#include <limits>

#include "draw_weights.h"

namespace kvferry {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kWordBits = 32;

inline bool allows(const uint32_t *allowed, int32_t token) {
    return (allowed[token / kWordBits] >> (token % kWordBits) & 1) != 0;
}

// -inf for every token that may not be drawn.
void restrict_to(const uint32_t *allowed, float *logits, int32_t vocab_size) {
    int32_t token = 0;
    for (; token + kWordBits <= vocab_size; token += kWordBits) {
        const uint32_t word = allowed[token / kWordBits];
        if (word == ~0u) continue;
        for (int32_t bit = 0; bit < kWordBits; ++bit)
            logits[token + bit] = (word >> bit & 1) != 0 ? logits[token + bit] : -kInfinity;
    }
    for (; token < vocab_size; ++token)
        if (!allows(allowed, token)) logits[token] = -kInfinity;
}

void penalise(const kvf_draw &draw, float *logits, int32_t vocab_size, uint32_t *counts) {
    // Generated tokens are counted; one bit says that a token was met at all, and one that its turn is over.
    constexpr uint32_t kMet = 1u << 31, kDone = 1u << 30;
    std::memset(counts, 0, sizeof *counts * static_cast<size_t>(vocab_size));
    for (int32_t i = 0; i < draw.num_prompt; ++i) counts[draw.tokens[i]] = kMet;
    for (int32_t i = draw.num_prompt; i < draw.num_tokens; ++i) {
        uint32_t &count = counts[draw.tokens[i]];
        count = (count | kMet) + 1;
    }
    for (int32_t i = 0; i < draw.num_tokens; ++i) {
        const uint32_t token = draw.tokens[i], count = counts[token];
        if (count & kDone) continue;
        counts[token] = count | kDone;
        float logit = logits[token];
        logit = logit > 0 ? logit / draw.repetition_penalty : logit * draw.repetition_penalty;
        if (const uint32_t generated = count & ~kMet; generated > 0) {
            logit -= draw.frequency_penalty * static_cast<float>(generated);
            logit -= draw.presence_penalty;
        }
        logits[token] = logit;
    }
}

}  // namespace

bool allows_any(const uint32_t *allowed, int32_t vocab_size) {
    for (int32_t word = 0; word < vocab_size / kWordBits; ++word)
        if (allowed[word] != 0) return true;
    const int32_t tail = vocab_size % kWordBits;
    return tail != 0 && (allowed[vocab_size / kWordBits] & ((1u << tail) - 1)) != 0;
}

void adjust(const kvf_draw &draw, float *logits, int32_t vocab_size, uint32_t *counts) {
    if (draw.allowed != nullptr) restrict_to(draw.allowed, logits, vocab_size);
    for (int32_t i = 0; i < draw.num_banned; ++i) logits[draw.banned[i]] = -kInfinity;
    for (int32_t i = 0; i < draw.num_biases; ++i) logits[draw.biases[i].token] += draw.biases[i].bias;
    if (penalised(draw)) penalise(draw, logits, vocab_size, counts);
    // A broken row in which nothing is left must not give a token that may not be drawn.
    if (draw.allowed == nullptr || largest(logits, vocab_size) > -kInfinity) return;
    for (int32_t token = 0; token < vocab_size; ++token)
        if (allows(draw.allowed, token)) logits[token] = 0;
}

}  // namespace kvferry
