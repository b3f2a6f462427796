// Vectors of fp32 and int32 as wide as the instruction set's, by the compiler's own vector types: the sampler's
// loops are element by element, so their bits are the same at any width.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace kvferry {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kVectorFloats = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

inline Floats load_floats(const float *from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// The first `count` elements, and `fill` behind them.
inline Floats load_floats(const float *from, int count, float fill) {
    float padded[kVectorFloats];
    for (int lane = 0; lane < kVectorFloats; ++lane) padded[lane] = lane < count ? from[lane] : fill;
    return load_floats(padded);
}

inline Ints load_ints(const int32_t *from) {
    Ints vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store_ints(int32_t *to, const Ints &vector) { std::memcpy(to, &vector, sizeof vector); }

// Lanes of `b` that are NaN give `a`; so do equal ones.
inline Floats larger(const Floats &a, const Floats &b) { return b > a ? b : a; }

inline float largest_lane(const Floats &vector) {
    float best = vector[0];
    for (int lane = 1; lane < kVectorFloats; ++lane) best = vector[lane] > best ? vector[lane] : best;
    return best;
}

// One bit for each lane of a comparison's result, the first lane lowest.
inline uint32_t bits_of(const Ints &mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX__) && !defined(__AVX512F__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__) && !defined(__AVX__)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kVectorFloats; ++lane) bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
    return bits;
#endif
}

}  // namespace kvferry
