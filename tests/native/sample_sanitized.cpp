// Random batches through kvf_sample with every buffer exactly as large as the interface says, so that the address
// sanitizer sees each step beyond. "overrun" as argument plants one: scratch memory of a smaller vocabulary.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "philox.h"
#include "sample.h"

namespace {

std::mt19937 engine(7);

int below(int bound) { return static_cast<int>(engine() % static_cast<unsigned>(bound)); }

struct Scratch {
    explicit Scratch(int32_t vocab_size) : memory(std::aligned_alloc(64, kvf_sample_scratch_bytes(vocab_size))) {
        std::memset(memory, 0xFF, kvf_sample_scratch_bytes(vocab_size));  // any content will do
    }
    ~Scratch() { std::free(memory); }
    void *memory;
};

// A row of one of several kinds; a broken one now and then.
void fill(std::vector<float> &row) {
    const int kind = below(8);
    std::normal_distribution<float> normal(0, kind == 0 ? 0 : static_cast<float>(kind) * 2);
    for (float &logit : row) logit = kind == 1 ? static_cast<float>(below(5)) : normal(engine);
    const float broken[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(), 3e38f, -3e38f};
    if (below(4) == 0) row[static_cast<size_t>(below(static_cast<int>(row.size())))] = broken[below(5)];
    if (below(40) == 0) row.assign(row.size(), broken[below(5)]);
}

bool run(int32_t vocab_size, bool overrun) {
    const Scratch scratch(overrun ? (vocab_size + 1) / 2 : vocab_size);
    const int num_draws = below(5) + 1;
    std::vector<float> logits;
    std::vector<kvf_draw> draws(static_cast<size_t>(num_draws));
    std::vector<std::vector<uint32_t>> histories(draws.size()), bans(draws.size()), masks(draws.size());
    std::vector<std::vector<kvf_bias>> biases(draws.size());
    std::vector<std::unique_ptr<kvf_logprobs>> logprobs(draws.size());
    for (size_t i = 0; i < draws.size(); ++i) {
        std::vector<float> row(static_cast<size_t>(vocab_size));
        fill(row);
        logits.insert(logits.end(), row.begin(), row.end());
        kvf_draw &draw = draws[i];
        std::memset(&draw, 0, sizeof draw);
        draw.temperature = below(4) * 0.5;
        draw.top_p = below(2) ? 1.0 : (below(100) + 1) / 100.0;
        draw.min_p = below(2) ? 0.0 : below(101) / 100.0;
        draw.top_k = below(2) ? 0 : below(2 * vocab_size);
        draw.seed = engine();
        draw.index = engine();
        draw.repetition_penalty = below(2) ? 1.0f : 1.3f;
        draw.presence_penalty = below(2) ? 0.0f : 0.5f;
        draw.frequency_penalty = below(2) ? 0.0f : -0.5f;
        for (int n = below(30); n > 0; --n) histories[i].push_back(static_cast<uint32_t>(below(vocab_size)));
        for (int n = below(3); n > 0; --n) bans[i].push_back(static_cast<uint32_t>(below(vocab_size)));
        for (int n = below(3); n > 0; --n) biases[i].push_back({static_cast<uint32_t>(below(vocab_size)), 1.5f});
        draw.tokens = histories[i].data();
        draw.num_tokens = static_cast<int32_t>(histories[i].size());
        draw.num_prompt = below(draw.num_tokens + 1);
        draw.banned = bans[i].data();
        draw.num_banned = static_cast<int32_t>(bans[i].size());
        draw.biases = biases[i].data();
        draw.num_biases = static_cast<int32_t>(biases[i].size());
        if (below(3) == 0) {
            masks[i].resize(static_cast<size_t>((vocab_size + 31) / 32));
            for (uint32_t &word : masks[i]) word = below(2) ? engine() : below(2) ? 0 : ~0u;
            const int allowed = below(vocab_size);
            masks[i][static_cast<size_t>(allowed / 32)] |= 1u << allowed % 32;
            draw.allowed = masks[i].data();
        }
        if (below(2)) {
            logprobs[i] = std::make_unique<kvf_logprobs>();
            draw.logprobs = logprobs[i].get();
            draw.num_logprobs = below(std::min(KVF_MAX_LOGPROBS, vocab_size) + 1);
        }
    }
    const std::vector<float> before = logits;
    std::vector<uint32_t> tokens(draws.size());
    if (kvf_sample(logits.data(), num_draws, vocab_size, draws.data(), scratch.memory, tokens.data()) != KVF_OK)
        return false;
    if (std::memcmp(before.data(), logits.data(), logits.size() * sizeof(float)) != 0) return false;
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i] >= static_cast<uint32_t>(vocab_size)) return false;
        if (!masks[i].empty() && (masks[i][tokens[i] / 32] >> tokens[i] % 32 & 1) == 0) return false;
    }
    return true;
}

// The vectors that Random123 publishes.
bool philox_is_right() {
    const uint32_t ones = 0xFFFFFFFF;
    const kvferry::PhiloxWords zero = kvferry::philox4x32({{0, 0, 0, 0}}, 0, 0);
    const kvferry::PhiloxWords full = kvferry::philox4x32({{ones, ones, ones, ones}}, ones, ones);
    return zero.word[0] == 0x6627E8D5 && zero.word[3] == 0x9B00DBD8 && full.word[0] == 0x408F276D &&
           full.word[3] == 0x6D5451FD;
}

}  // namespace

int main(int argc, char **argv) {
    const bool overrun = argc > 1 && std::strcmp(argv[1], "overrun") == 0;
    if (!philox_is_right()) return 1;
    for (int round = 0; round < 1000; ++round) {
        const int32_t vocab_size = overrun ? 4096 : below(round % 10 == 0 ? 3000 : 90) + 1;
        if (!run(vocab_size, overrun)) {
            std::printf("round %d, vocabulary %d\n", round, vocab_size);
            return 1;
        }
    }
    return 0;
}
