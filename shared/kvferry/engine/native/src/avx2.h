// Traits of AVX2 with FMA: 8 lanes, 16 registers. Names are explained in isa.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "bf16.h"
#include "prefetch.h"

namespace kvferry {

struct Isa {
  static constexpr const char* kName = "avx2";
  static constexpr bool kTiles = false;
  static constexpr int kLanes = 8;
  static constexpr int kPanelVectors = 4;
  // 5 x 2 accumulators, 2 weight vectors, a broadcast and a mask: 14 of 16 registers. GCC 12 spills with a sixth row.
  static constexpr int kMaxRows = 5;
  // 4 x 2 accumulators, 2 weight vectors and a broadcast, each as even and odd bytes, and a product.
  static constexpr int kMaxRowsInt8 = 4;
  // Few rows take more vectors, so that as many independent chains hide the latency of the multiply-add.
  static constexpr int tile_vectors(int rows) { return rows <= 2 ? 4 : 2; }
  // Without dot products from three rows on multiplying takes longer than reading.
  static constexpr Ahead ahead(int rows) { return rows <= 2 ? Ahead{4096, 1} : Ahead{8192, 2}; }
  static constexpr Ahead kAheadInt8{2048, 1};  // farther is slower, unlike in bf16
  static constexpr bool kDotsPairs = false;

  using F = __m256;
  using P = __m256i;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static F load_n(const float* from, int n) { return _mm256_maskload_ps(from, first(n)); }
  static F load_bf16(const bf16* from) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static F load_bf16_n(const bf16* from, int n) {
    bf16 lanes[kLanes] = {};
    std::memcpy(lanes, from, static_cast<size_t>(n) * sizeof(bf16));
    return load_bf16(lanes);
  }

  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static void store_n(float* to, F value, int n) { _mm256_maskstore_ps(to, first(n), value); }
  static void store_bf16(bf16* to, F value) {
    const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(rounded(value)), 16);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
  static void store_bf16_n(bf16* to, F value, int n) {
    bf16 lanes[kLanes];
    store_bf16(lanes, value);
    std::memcpy(to, lanes, static_cast<size_t>(n) * sizeof(bf16));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F round_bf16(F value) {
    return _mm256_and_ps(rounded(value), _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F blend_n(F a, F b, int n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(n))); }
  static F power_of_two(F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }

  static float hsum(F v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float hmax(F v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  static P load_pairs(const bf16* from) { return load_bytes(from); }
  static P broadcast_pair(const bf16* from) { return broadcast_bytes(from); }
  static P keep_pairs_n(P pairs, int n) { return _mm256_and_si256(pairs, first(n)); }
  static P keep_low(P pairs) { return _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)); }
  static void store_pairs(bf16* to, P pairs) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs); }
  static F low(P pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static F high(P pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F dot2(F acc, P a, P b) { return fma(high(a), high(b), fma(low(a), low(b), acc)); }

  static I set1_int(int32_t value) { return _mm256_set1_epi32(value); }
  static I load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static I broadcast_bytes(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
  }
  // Not maddubs: it saturates. Even and odd bytes are widened to 16 bits, where madd is exact.
  static I dot4(I acc, I u8, I s8) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u8, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  static F to_float(I value) { return _mm256_cvtepi32_ps(value); }

  static constexpr bool kStreamsLines = false;  // a vector is part of a line
  static void stream(void* to, P vector) { std::memcpy(to, &vector, sizeof vector); }
  static void end_streams() {}

 private:
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F widen(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  // The upper half of each lane becomes the nearest bf16 (ties to even, NaN quieted); the lower half is rubbish.
  static F rounded(F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet),
                            _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  }
};

}  // namespace kvferry
