#include "descent.h"

#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace kvferry {
namespace {

using Sum = Descent::Sum;

// Bits of fp32 numbers: of 1, and behind those of 2^30.
constexpr uint32_t kOne = 0x3F800000;
constexpr uint32_t kBehindLargest = kOne + (30u << 23) + 1;

// The whole number at a place of the bisection's scale. Every weight is on it: it came from an fp32 number.
inline int32_t weight_of(uint32_t bits) {
    float weight;
    std::memcpy(&weight, &bits, sizeof weight);
    return static_cast<int32_t>(std::ceil(weight));
}

// Of the weights that are at least `bound`.
Sum sum_above(const int32_t *weights, int32_t count, int32_t bound) {
    // Halves of 15 bits, so that 32-bit lanes can add up a block of vectors without overflow.
    constexpr int32_t kBlock = kVectorFloats << 14;
    Sum sum{};
    int32_t i = 0;
    while (count - i >= kVectorFloats) {
        const int32_t end = i + std::min(kBlock, (count - i) / kVectorFloats * kVectorFloats);
        Ints low{}, high{}, tokens{};
        for (; i < end; i += kVectorFloats) {
            const Ints vector = load_ints(weights + i);
            const Ints counted = vector >= bound;
            const Ints above = vector & counted;
            low += above & 0x7FFF;
            high += above >> 15;
            tokens -= counted;
        }
        for (int lane = 0; lane < kVectorFloats; ++lane) {
            sum.mass += static_cast<uint64_t>(low[lane]) + (static_cast<uint64_t>(high[lane]) << 15);
            sum.tokens += static_cast<uint64_t>(tokens[lane]);
        }
    }
    for (; i < count; ++i) {
        if (weights[i] < bound) continue;
        sum.mass += static_cast<uint64_t>(weights[i]);
        sum.tokens += 1;
    }
    return sum;
}

// Tokens that are still in question, in the order of their ids.
struct Candidates {
    const int32_t *weights;
    const uint32_t *tokens;  // NULL: all of the vocabulary
    int32_t count;

    // Keep those of a weight in [low, high), in `kept_weights` and `kept_tokens`, which may hold them already.
    void keep(int32_t low, int32_t high, int32_t *kept_weights, uint32_t *kept_tokens) {
        int32_t num_kept = 0;
        const auto take = [&](int32_t i) {
            kept_tokens[num_kept] = tokens == nullptr ? static_cast<uint32_t>(i) : tokens[i];
            kept_weights[num_kept++] = weights[i];
        };
        int32_t i = 0;
        for (; i + 64 <= count; i += 64) {
            uint64_t wanted = 0;
            for (int j = 0; j < 64; j += kVectorFloats) {
                const Ints vector = load_ints(weights + i + j);
                wanted |= static_cast<uint64_t>(bits_of((vector >= low) & (vector < high))) << j;
            }
            for (; wanted != 0; wanted &= wanted - 1) take(i + __builtin_ctzll(wanted));
        }
        for (; i < count; ++i)
            if (weights[i] >= low && weights[i] < high) take(i);
        *this = {kept_weights, kept_tokens, num_kept};
    }
};

}  // namespace

Descent::Descent(const int32_t *weights, int32_t count, uint32_t *candidates)
    : weights_(weights),
      count_(count),
      candidate_weights_(reinterpret_cast<int32_t *>(candidates)),
      candidate_tokens_(candidates + count),
      all_(sum_above(weights, count, 1)) {}

template <uint64_t Sum::*member>
Descent::Place Descent::find(uint64_t target) const {
    Candidates candidates{weights_, nullptr, count_};
    Sum missing{};                               // weights above those of the candidates
    uint32_t low = kOne, high = kBehindLargest;  // the wanted weight lies in [low, high)
    Sum from_low = all_, from_high{};            // of the weights from there up
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        Sum sum = sum_above(candidates.weights, candidates.count, weight_of(middle));
        sum.mass += missing.mass;
        sum.tokens += missing.tokens;
        if (sum.*member > target) {
            low = middle;
            from_low = sum;
        } else {
            high = middle;
            from_high = sum;
        }
        if ((from_low.tokens - from_high.tokens) * 4 <= static_cast<uint64_t>(candidates.count)) {
            candidates.keep(weight_of(low), weight_of(high), candidate_weights_, candidate_tokens_);
            missing = from_high;
        }
    }
    candidates.keep(weight_of(low), weight_of(high), candidate_weights_, candidate_tokens_);
    const uint64_t weight = static_cast<uint64_t>(weight_of(low));
    const uint64_t place = member == &Sum::mass ? (target - from_high.mass) / weight : target - from_high.tokens;
    return {candidates.tokens[place], from_high.mass + (place + 1) * weight};
}

Descent::Place Descent::by_mass(uint64_t mass) const { return find<&Sum::mass>(mass); }

Descent::Place Descent::by_rank(int64_t rank) const { return find<&Sum::tokens>(static_cast<uint64_t>(rank)); }

}  // namespace kvferry
