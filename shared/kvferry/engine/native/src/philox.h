// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): a draw's randomness is a
// function of (seed, choice, index), with no state.

#pragma once

#include <cstdint>

namespace kvferry {

struct PhiloxWords {
    uint32_t word[4];
};

inline PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
    uint32_t *c = counter.word;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0];
        const uint64_t b = uint64_t{0xCD9E8D57} * c[2];
        c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key0;
        c[1] = static_cast<uint32_t>(b);
        c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key1;
        c[3] = static_cast<uint32_t>(a);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// The draw's uniform in units of 2^-24: the upper 24 bits of the first word. Key words are the low and the high
// half of the seed, counter words are (choice, index, 0, 0).
inline uint32_t philox_uniform24(uint64_t seed, uint32_t choice, uint32_t index) {
    const PhiloxWords counter{{choice, index, 0, 0}};
    return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).word[0] >> 8;
}

}  // namespace kvferry
