// Traits of AVX-512 with BF16 and VNNI: 16 lanes, 32 registers. Names are explained in isa.h.
#pragma once

// GCC 12 believes that _mm512_undefined_ps and its like, used inside its own intrinsics, are read (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

#include "bf16.h"
#include "prefetch.h"

namespace kvferry {

struct Avx512 {
  static constexpr const char* kName = "avx512";
  static constexpr bool kTiles = false;
  static constexpr int kLanes = 16;
  static constexpr int kPanelVectors = 3;
  // 8 x 3 accumulators, 3 weight vectors and a broadcast: 28 of 32 registers.
  static constexpr int kMaxRows = 8;
  static constexpr int kMaxRowsInt8 = 8;
  static constexpr int tile_vectors(int) { return kPanelVectors; }
  // Up to six rows are faster than memory: Zen 4's own prefetchers read 12 to 17 % more without ours. From seven on
  // multiplying takes as long as reading, and they come too late: asking saves a fifth.
  static constexpr Ahead ahead(int rows) { return rows <= 6 ? Ahead{0, 1} : Ahead{8192, 2}; }
  static constexpr Ahead kAheadInt8{0, 1};
  static constexpr bool kDotsPairs = true;

  using F = __m512;
  using P = __m512i;
  using I = __m512i;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static F load_n(const float* from, int n) { return _mm512_maskz_loadu_ps(first(n), from); }
  static F load_bf16(const bf16* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static F load_bf16_n(const bf16* from, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), from)); }

  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static void store_n(float* to, F value, int n) { _mm512_mask_storeu_ps(to, first(n), value); }
  static void store_bf16(bf16* to, F value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value)); }
  static void store_bf16_n(bf16* to, F value, int n) { _mm256_mask_storeu_epi16(to, first(n), narrow(value)); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round_bf16(F value) { return widen(narrow(value)); }
  static F blend_n(F a, F b, int n) { return _mm512_mask_blend_ps(first(n), b, a); }
  static F power_of_two(F n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }

  static float hsum(F v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float hmax(F v) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  static P load_pairs(const bf16* from) { return _mm512_loadu_si512(from); }
  static P broadcast_pair(const bf16* from) { return broadcast_bytes(from); }
  static P keep_pairs_n(P pairs, int n) { return _mm512_maskz_mov_epi32(first(n), pairs); }
  static P keep_low(P pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff)); }
  static void store_pairs(bf16* to, P pairs) { _mm512_storeu_si512(to, pairs); }
  static F low(P pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static F high(P pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F dot2(F acc, P a, P b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static I set1_int(int32_t value) { return _mm512_set1_epi32(value); }
  static I load_bytes(const void* from) { return _mm512_loadu_si512(from); }
  static I broadcast_bytes(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
  }
  // As an intrinsic GCC 12 copies every accumulator around it, and spills: half the speed of a tile.
  static I dot4(I acc, I u8, I s8) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
    return acc;
  }
  static F to_float(I value) { return _mm512_cvtepi32_ps(value); }

  static constexpr bool kStreamsLines = true;
  static void stream(void* line, P vector) { _mm512_stream_si512(static_cast<__m512i*>(line), vector); }
  static void end_streams() { _mm_sfence(); }

 private:
  static F widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static __m256i narrow(F value) { return (__m256i)_mm512_cvtneps_pbh(value); }
};

}  // namespace kvferry
