#include "sample.h"

#include <cmath>
#include <cstring>

#include "descent.h"
#include "draw_rows.h"
#include "draw_weights.h"
#include "logprobs.h"
#include "penalties.h"
#include "philox.h"

namespace kvferry {
namespace {

// What native/sampler.py packs.
static_assert(sizeof(void *) == 8 && sizeof(kvf_draw) == 120 && sizeof(kvf_logprobs) == 168);

constexpr double kMinTemperature = 1e-5;  // colder is greedy
constexpr double kLog2E = 0x1.71547652b82fep+0;

// Parts of the scratch memory, each as long as the vocabulary rounded up to whole cache lines.
struct Scratch {
    float *logits;         // adjusted or repaired
    int32_t *weights;      // of the draw
    uint32_t *candidates;  // twice as long; token counts before that

    Scratch(void *memory, int32_t vocab_size) {
        const size_t part = padded(vocab_size);
        logits = static_cast<float *>(memory);
        weights = reinterpret_cast<int32_t *>(logits + part);
        candidates = reinterpret_cast<uint32_t *>(weights + part);
    }
    static size_t padded(int32_t vocab_size) { return (static_cast<size_t>(vocab_size) + 15) / 16 * 16; }
    static uint64_t bytes(int32_t vocab_size) { return padded(vocab_size) * 4 * sizeof(float); }
};

bool tokens_valid(const uint32_t *tokens, int32_t count, int32_t vocab_size) {
    uint32_t highest = 0;
    for (int32_t i = 0; i < count; ++i) highest = tokens[i] > highest ? tokens[i] : highest;
    return highest < static_cast<uint32_t>(vocab_size);
}

int32_t check(const kvf_draw &draw, int32_t vocab_size) {
    // Written so that NaN fails.
    if (!(draw.temperature >= 0) || !(draw.top_p > 0) || !(draw.min_p >= 0 && draw.min_p <= 1)) return KVF_E_ARGUMENT;
    if (draw.top_k < 0 || !(draw.repetition_penalty > 0)) return KVF_E_ARGUMENT;
    if (!std::isfinite(draw.presence_penalty) || !std::isfinite(draw.frequency_penalty)) return KVF_E_ARGUMENT;
    if (draw.num_biases < 0 || draw.num_biases > KVF_MAX_BIASES || (draw.num_biases > 0 && draw.biases == nullptr))
        return KVF_E_ARGUMENT;
    if (draw.num_banned < 0 || draw.num_banned > KVF_MAX_BIASES || (draw.num_banned > 0 && draw.banned == nullptr))
        return KVF_E_ARGUMENT;
    if (draw.logprobs != nullptr && (draw.num_logprobs < 0 || draw.num_logprobs > KVF_MAX_LOGPROBS ||
                                     draw.num_logprobs > vocab_size))
        return KVF_E_ARGUMENT;
    if (!tokens_valid(draw.banned, draw.num_banned, vocab_size)) return KVF_E_TOKEN;
    if (draw.allowed != nullptr && !allows_any(draw.allowed, vocab_size)) return KVF_E_ARGUMENT;
    for (int32_t i = 0; i < draw.num_biases; ++i)
        if (draw.biases[i].token >= static_cast<uint32_t>(vocab_size)) return KVF_E_TOKEN;
    if (!penalised(draw)) return KVF_OK;
    if (draw.num_prompt < 0 || draw.num_prompt > draw.num_tokens || draw.num_tokens > KVF_MAX_LEN + 1)
        return KVF_E_ARGUMENT;
    if (draw.num_tokens > 0 && draw.tokens == nullptr) return KVF_E_ARGUMENT;
    return tokens_valid(draw.tokens, draw.num_tokens, vocab_size) ? KVF_OK : KVF_E_TOKEN;
}

// floor(mass * uniform / 2^24), exact: below `mass`, as the uniform is below 2^24.
uint64_t share_of(uint64_t mass, uint32_t uniform) {
    const uint64_t high = mass >> 24, low = mass & 0xFFFFFF;
    return high * uniform + (low * uniform >> 24);
}

uint32_t draw_seeded(const kvf_draw &draw, const float *logits, int32_t vocab_size, const Scratch &scratch) {
    float best = largest(logits, vocab_size);
    if (std::isinf(best) && best > 0) {
        repair(logits, scratch.logits, vocab_size);
        logits = scratch.logits;
        best = largest(logits, vocab_size);
    }
    const float scale = static_cast<float>(kLog2E / draw.temperature);
    if (std::isfinite(best)) {
        const int32_t floor = static_cast<int32_t>(std::ceil(draw.min_p * kWeightOne));
        weigh(logits, vocab_size, best, scale, floor, scratch.weights);
    } else {
        // Nothing but -inf and NaN: every token is as good as any.
        for (int32_t i = 0; i < vocab_size; ++i) scratch.weights[i] = kWeightOne;
    }
    Descent descent(scratch.weights, vocab_size, scratch.candidates);
    // Every filter keeps a prefix of the order, so all that it changes is the mass to draw from.
    uint64_t mass = descent.mass();
    if (draw.top_k > 0 && draw.top_k < descent.num_weighing()) mass = descent.by_rank(draw.top_k - 1).mass;
    if (draw.top_p < 1) {
        // The smallest prefix that holds top_p of the mass, and at least one token.
        const double wanted = std::ceil(draw.top_p * static_cast<double>(mass));
        mass = descent.by_mass(static_cast<uint64_t>(wanted) - 1).mass;
    }
    return descent.by_mass(share_of(mass, philox_uniform24(draw.seed, draw.choice, draw.index))).token;
}

uint32_t draw_token(const kvf_draw &draw, const float *logits, int32_t vocab_size, const Scratch &scratch) {
    if (adjusts(draw)) {
        std::memcpy(scratch.logits, logits, sizeof *logits * static_cast<size_t>(vocab_size));
        adjust(draw, scratch.logits, vocab_size, scratch.candidates);
        logits = scratch.logits;
    }
    if (draw.temperature < kMinTemperature) return static_cast<uint32_t>(argmax(logits, vocab_size));
    return draw_seeded(draw, logits, vocab_size, scratch);
}

}  // namespace

int32_t check_draws(const float *logits, int32_t num_draws, int32_t vocab_size, const kvf_draw *draws,
                    const uint32_t *tokens) {
    if (num_draws < 0 || num_draws > KVF_MAX_DRAWS || kvf_sample_scratch_bytes(vocab_size) == 0) return KVF_E_ARGUMENT;
    if (num_draws == 0) return KVF_OK;
    if (logits == nullptr || draws == nullptr || tokens == nullptr) return KVF_E_ARGUMENT;
    for (int32_t i = 0; i < num_draws; ++i)
        if (const int32_t error = check(draws[i], vocab_size); error != KVF_OK) return error;
    return KVF_OK;
}

void draw_rows(const float *logits, int32_t begin, int32_t end, int32_t vocab_size, const kvf_draw *draws,
               void *scratch, uint32_t *tokens) {
    const Scratch parts(scratch, vocab_size);
    for (int32_t i = begin; i < end; ++i) {
        const float *row = logits + static_cast<size_t>(i) * static_cast<size_t>(vocab_size);
        tokens[i] = draw_token(draws[i], row, vocab_size, parts);
        if (draws[i].logprobs != nullptr)
            find_logprobs(row, vocab_size, tokens[i], draws[i].num_logprobs, parts.weights, draws[i].logprobs);
    }
}

int32_t check_scores(const float *logits, int32_t num_rows, int32_t vocab_size, const uint32_t *targets,
                     int32_t num_top, const kvf_logprobs *logprobs) {
    if (num_rows < 0 || num_rows > KVF_MAX_STEP_ROWS || kvf_sample_scratch_bytes(vocab_size) == 0)
        return KVF_E_ARGUMENT;
    if (num_top < 0 || num_top > KVF_MAX_LOGPROBS || num_top > vocab_size) return KVF_E_ARGUMENT;
    if (num_rows == 0) return KVF_OK;
    if (logits == nullptr || targets == nullptr || logprobs == nullptr) return KVF_E_ARGUMENT;
    return tokens_valid(targets, num_rows, vocab_size) ? KVF_OK : KVF_E_TOKEN;
}

void score_rows(const float *logits, int32_t begin, int32_t end, int32_t vocab_size, const uint32_t *targets,
                int32_t num_top, void *scratch, kvf_logprobs *logprobs) {
    const Scratch parts(scratch, vocab_size);
    for (int32_t i = begin; i < end; ++i) {
        const float *row = logits + static_cast<size_t>(i) * static_cast<size_t>(vocab_size);
        find_logprobs(row, vocab_size, targets[i], num_top, parts.weights, &logprobs[i]);
    }
}

}  // namespace kvferry

extern "C" {

uint64_t kvf_sample_scratch_bytes(int32_t vocab_size) {
    if (vocab_size < 1 || vocab_size > KVF_MAX_DIMENSION) return 0;
    return kvferry::Scratch::bytes(vocab_size);
}

int32_t kvf_sample(const float *logits, int32_t num_draws, int32_t vocab_size, const kvf_draw *draws, void *scratch,
                   uint32_t *tokens) {
    if (const int32_t error = kvferry::check_draws(logits, num_draws, vocab_size, draws, tokens); error != KVF_OK)
        return error;
    if (num_draws > 0 && scratch == nullptr) return KVF_E_ARGUMENT;
    kvferry::draw_rows(logits, 0, num_draws, vocab_size, draws, scratch, tokens);
    return KVF_OK;
}

}  // extern "C"
