// The instruction set that this build is for, as one struct of vector traits: `Isa`.
//
// Kernels are written once over these names; amx.h, avx512.h, avx2.h and portable.h define them.
//
//   kName                 "amx", "avx512", "avx2" or "portable"
//   kTiles                products of weights run on tile registers (tile_amx.cpp), not on vectors
//   kLanes                W, fp32 lanes of a vector
//   kPanelVectors         vectors side by side in a panel of packed weights; a panel has W * kPanelVectors columns
//   kMaxRows              rows of the largest bf16 tile;  kMaxRowsInt8: of the largest int8 tile
//   tile_vectors(rows)    vectors that a tile of so many rows keeps in registers at once; divides kPanelVectors
//   ahead(rows)           how a bf16 tile of so many rows asks for weights, which come from memory where few rows share
//                         them: as measured, see avx512.h;  kAheadInt8: the same of every int8 tile
//   kDotsPairs            dot2 is one instruction (else low(), high() and two multiply-adds)
//   F, P, I               W fp32 · W pairs of bf16 (low half first) · W int32 (or W groups of four bytes)
//
//   F  zero() set1(float) load(const float*) load_n(const float*, n)    n of W lanes read, the others 0
//      load_bf16(const bf16*) load_bf16_n(const bf16*, n)
//   void store(float*, F) store_n(float*, F, n) store_bf16(bf16*, F) store_bf16_n(bf16*, F, n)
//   F  add sub mul div max min(F, F)  fma(F a, F b, F c) = a * b + c, fused on x86, rounded twice in the portable build
//   F  round_bf16(F)                    to bf16 (ties to even) and back
//   F  blend_n(F a, F b, n)             lanes below n from a, the others from b
//   F  power_of_two(F n)                2^n, n a whole number in [-126, 127]
//   float hsum(F) hmax(F)               by halves: lane i with lane i + W/2, then W/4, ...
//   P  load_pairs(const bf16*) broadcast_pair(const bf16*)        2W values · two values into every lane
//   P  keep_pairs_n(P, n) keep_low(P)   pairs from lane n on become zero · the high half of each pair does
//   void store_pairs(bf16*, P)
//   F  low(P) high(P)                   the first, the second value of each pair
//   F  dot2(F acc, P a, P b)            acc + a.low * b.low + a.high * b.high
//   I  set1_int(int32_t) load_bytes(const void*) broadcast_bytes(const void*)     4W bytes · four bytes into every lane
//   I  dot4(I acc, I u8, I s8)          acc + the four products of unsigned by signed bytes, without saturation, exact
//   F  to_float(I)
//   void stream(void* line, P)          a whole aligned cache line past the caches, if kStreamsLines; else a store
//   void end_streams()                  what was streamed is visible to whom later writes are
//
// No alignment is asked for anywhere else. exp over F is vector_math.h.
#pragma once

#if defined(KVF_AMX)
#include "amx.h"
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "avx512.h"
namespace kvferry {
using Isa = Avx512;
}
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#else
#include "portable.h"
#endif

#if !defined(KVF_AMX)
namespace kvferry {
struct TileRegisters {};  // vectors need nothing shaped
}
#endif

#include "vector_math.h"
