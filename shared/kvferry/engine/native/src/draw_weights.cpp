#include "draw_weights.h"

#include <cmath>
#include <limits>

#include "lanes.h"

namespace kvferry {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargestLogit = 1e30f;
// 2^f - 1 = f * (c0 + f * (c1 + ...)) on [-0.5, 0.5], minimax, relative error below 2e-9 before rounding.
constexpr float kExp2[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                           0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbcp-13f};
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
constexpr float kLowestExponent = -33.0f;  // weighs 0

// Exponents at most 0. Multiplications and additions stay apart (-ffp-contract=off): numpy computes the same bits.
inline Ints fixed_point(const Floats &exponents) {
    const Floats lowest = Floats{} + kLowestExponent;
    const Floats y = larger(lowest, exponents);  // NaN becomes the lowest
    const Floats shifted = y + kRounder;
    const Floats whole = shifted - kRounder;
    const Floats f = y - whole;
    Floats p = kExp2[5] * f + kExp2[4];
    p = p * f + kExp2[3];
    p = p * f + kExp2[2];
    p = p * f + kExp2[1];
    p = p * f + kExp2[0];
    p = p * f + 1.0f;
    // 2^(whole + 30), by its exponent bits.
    const Ints bits = (__builtin_convertvector(whole, Ints) + (127 + 30)) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return __builtin_convertvector(p * power, Ints);
}

}  // namespace

float largest(const float *logits, int32_t count) {
    // Four chains hide the latency of the comparison.
    Floats best[4];
    for (Floats &chain : best) chain = Floats{} - kInfinity;
    int32_t i = 0;
    for (; i + 4 * kVectorFloats <= count; i += 4 * kVectorFloats)
        for (int chain = 0; chain < 4; ++chain)
            best[chain] = larger(best[chain], load_floats(logits + i + chain * kVectorFloats));
    for (; i < count; i += kVectorFloats) best[0] = larger(best[0], load_floats(logits + i, count - i, -kInfinity));
    return largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

void repair(const float *from, float *to, int32_t count) {
    for (int32_t i = 0; i < count; ++i)
        to[i] = std::isnan(from[i]) ? -kInfinity : from[i] == kInfinity ? kLargestLogit : from[i];
}

void weigh(const float *logits, int32_t count, float best, float scale, int32_t floor, int32_t *weights) {
    int32_t i = 0;
    for (; i + kVectorFloats <= count; i += kVectorFloats) {
        const Ints weight = fixed_point((load_floats(logits + i) - best) * scale);
        store_ints(weights + i, weight & (weight >= floor));
    }
    if (i == count) return;
    const Ints weight = fixed_point((load_floats(logits + i, count - i, -kInfinity) - best) * scale);
    for (int lane = 0; i + lane < count; ++lane) weights[i + lane] = weight[lane] >= floor ? weight[lane] : 0;
}

int32_t argmax(const float *logits, int32_t count) {
    // Each lane keeps the first place of its largest value, in as many chains as hide the latency.
    constexpr int kChains = 4, kBlock = kChains * kVectorFloats;
    Floats best[kChains];
    Ints place[kChains], here[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
        best[chain] = Floats{} - kInfinity;
        place[chain] = Ints{};
        for (int lane = 0; lane < kVectorFloats; ++lane) here[chain][lane] = chain * kVectorFloats + lane;
    }
    int32_t i = 0;
    for (; i + kBlock <= count; i += kBlock) {
        for (int chain = 0; chain < kChains; ++chain) {
            const Floats logit = load_floats(logits + i + chain * kVectorFloats);
            const Ints better = logit > best[chain];
            best[chain] = better ? logit : best[chain];
            place[chain] = better ? here[chain] : place[chain];
            here[chain] += kBlock;
        }
    }
    float highest = -kInfinity;
    int32_t first = 0;
    for (int chain = 0; chain < kChains; ++chain) {
        for (int lane = 0; lane < kVectorFloats; ++lane) {
            const float logit = best[chain][lane];
            if (logit < highest || (logit == highest && place[chain][lane] >= first)) continue;
            highest = logit;
            first = place[chain][lane];
        }
    }
    for (; i < count; ++i) {
        if (!(logits[i] > highest)) continue;
        highest = logits[i];
        first = i;
    }
    return first;
}

}  // namespace kvferry
