#include "penalties.h"

#include <cstring>
#include <limits>

namespace kvferry {

void adjust(const kvf_draw &draw, float *logits, int32_t vocab_size, uint32_t *counts) {
    for (int32_t i = 0; i < draw.num_banned; ++i) logits[draw.banned[i]] = -std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < draw.num_biases; ++i) logits[draw.biases[i].token] += draw.biases[i].bias;
    if (!penalised(draw)) return;

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

}  // namespace kvferry
