// Traits in plain C++ over the compiler's vector extension: 4 lanes on any processor. Names are explained in isa.h.
//
// Multiply-add is two roundings here, so that every processor gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "prefetch.h"

namespace kvferry {

struct Isa {
  static constexpr const char* kName = "portable";
  static constexpr bool kTiles = false;
  static constexpr int kLanes = 4;
  static constexpr int kPanelVectors = 4;
  static constexpr int kMaxRows = 4;
  static constexpr int kMaxRowsInt8 = 2;
  static constexpr int tile_vectors(int rows) { return rows <= 2 ? 4 : 2; }
  // As avx2.h, not measured.
  static constexpr Ahead ahead(int rows) { return rows <= 2 ? Ahead{4096, 1} : Ahead{8192, 2}; }
  static constexpr Ahead kAheadInt8{2048, 1};
  static constexpr bool kDotsPairs = false;

  using F = float __attribute__((vector_size(16)));
  using P = uint32_t __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));

  static F zero() { return F{}; }
  static F set1(float value) { return F{value, value, value, value}; }
  static F load(const float* from) { return read<F>(from); }
  static F load_n(const float* from, int n) {
    F value{};
    std::memcpy(&value, from, static_cast<size_t>(n) * sizeof(float));
    return value;
  }
  static F load_bf16(const bf16* from) { return load_bf16_n(from, kLanes); }
  static F load_bf16_n(const bf16* from, int n) {
    uint16_t halves[kLanes] = {};
    std::memcpy(halves, from, static_cast<size_t>(n) * sizeof(bf16));
    return reinterpret_cast<F>(P{halves[0], halves[1], halves[2], halves[3]} << 16);
  }

  static void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
  static void store_n(float* to, F value, int n) { std::memcpy(to, &value, static_cast<size_t>(n) * sizeof(float)); }
  static void store_bf16(bf16* to, F value) { store_bf16_n(to, value, kLanes); }
  static void store_bf16_n(bf16* to, F value, int n) {
    const P words = rounded(value) >> 16;
    const uint16_t halves[kLanes] = {static_cast<uint16_t>(words[0]), static_cast<uint16_t>(words[1]),
                                     static_cast<uint16_t>(words[2]), static_cast<uint16_t>(words[3])};
    std::memcpy(to, halves, static_cast<size_t>(n) * sizeof(bf16));
  }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F round_bf16(F value) { return reinterpret_cast<F>(rounded(value) & 0xffff0000u); }
  static F blend_n(F a, F b, int n) { return first(n) ? a : b; }
  static F power_of_two(F n) { return reinterpret_cast<F>((__builtin_convertvector(n, I) + 127) << 23); }

  static float hsum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float hmax(F v) {
    const float even = v[0] > v[2] ? v[0] : v[2];
    const float odd = v[1] > v[3] ? v[1] : v[3];
    return even > odd ? even : odd;
  }

  static P load_pairs(const bf16* from) { return read<P>(from); }
  static P broadcast_pair(const bf16* from) { return reinterpret_cast<P>(broadcast_bytes(from)); }
  static P keep_pairs_n(P pairs, int n) { return pairs & reinterpret_cast<P>(first(n)); }
  static P keep_low(P pairs) { return pairs & 0xffffu; }
  static void store_pairs(bf16* to, P pairs) { std::memcpy(to, &pairs, sizeof pairs); }
  static F low(P pairs) { return reinterpret_cast<F>(pairs << 16); }
  static F high(P pairs) { return reinterpret_cast<F>(pairs & 0xffff0000u); }
  static F dot2(F acc, P a, P b) { return high(a) * high(b) + (low(a) * low(b) + acc); }

  static I set1_int(int32_t value) { return I{value, value, value, value}; }
  static I load_bytes(const void* from) { return read<I>(from); }
  static I broadcast_bytes(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return set1_int(four);
  }
  // A product of an unsigned and a signed byte fits 16 bits, which every processor multiplies in vectors.
  static I dot4(I acc, I u8, I s8) {
    const Halves weights = reinterpret_cast<Halves>(u8);
    const Halves inputs = reinterpret_cast<Halves>(s8);
    const I even = reinterpret_cast<I>((weights & 0xff) * shift_right(shift_left(inputs)));
    const I odd = reinterpret_cast<I>((shift_right(weights) & 0xff) * shift_right(inputs));
    return acc + widen_low(even) + (even >> 16) + widen_low(odd) + (odd >> 16);
  }
  static F to_float(I value) { return __builtin_convertvector(value, F); }

  static constexpr bool kStreamsLines = false;  // a vector is part of a line
  static void stream(void* to, P vector) { std::memcpy(to, &vector, sizeof vector); }
  static void end_streams() {}

 private:
  using Halves = int16_t __attribute__((vector_size(16)));
  using UnsignedHalves = uint16_t __attribute__((vector_size(16)));

  template <typename Vector>
  static Vector read(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static I first(int n) { return I{0, 1, 2, 3} < set1_int(n); }
  // Shifted as unsigned: a left shift of a negative number is undefined in C++17.
  static Halves shift_left(Halves v) { return reinterpret_cast<Halves>(reinterpret_cast<UnsignedHalves>(v) << 8); }
  static Halves shift_right(Halves v) { return v >> 8; }
  static I widen_low(I v) { return reinterpret_cast<I>(reinterpret_cast<P>(v) << 16) >> 16; }
  // The upper half of each lane becomes the nearest bf16 (ties to even, NaN quieted); the lower half is rubbish.
  static P rounded(F value) {
    const P bits = reinterpret_cast<P>(value);
    const P up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value == value ? up : bits | 0x400000u;
  }
};

}  // namespace kvferry
