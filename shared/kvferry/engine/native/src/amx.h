// Traits of AVX-512 with AMX: vectors are those of avx512.h, products run on tile registers. Names are explained in isa.h.
//
// A tile register has up to 16 rows of 64 bytes. As assembly, since compilers' intrinsics take register numbers as text
// only and don't tell what memory they read. Instructions: Intel's Software Developer's Manual, volume 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "avx512.h"

namespace kvferry {

struct Isa : Avx512 {
  static constexpr const char* kName = "amx";
  static constexpr bool kTiles = true;
};

constexpr int kTileRegisterRows = 16;
constexpr int kTileRegisterBytes = 64;  // of a row

// What registers are for.
enum class TileUse {
  Product,    // 6, 7: weights, 16 rows; others sums and x
  Attention,  // 0 to 3: scores and sums; 4: queries; 5: keys, 16 rows; 6: probabilities, of 16 positions; 7: their values
};

// The tile registers of this thread: shaped when they are first used, given back at the end, since a thread that has
// some costs 8 KiB more at each switch. A process needs the kernel's leave before, see may_use_tiles.
class TileRegisters {
 public:
  TileRegisters() = default;
  ~TileRegisters() {
    if (rows_ != 0) asm volatile("tilerelease");
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // For `rows` rows, 1 to 16. What the registers hold is lost, unless they have this shape.
  void shape(TileUse use, int rows) {
    if (use == use_ && rows == rows_) return;
    Layout layout{};
    for (int i = 0; i < 8; ++i) {
      layout.row_bytes[i] = kTileRegisterBytes;
      layout.rows[i] = static_cast<uint8_t>(rows);
    }
    if (use == TileUse::Product) {
      layout.rows[6] = layout.rows[7] = kTileRegisterRows;
    } else {
      layout.rows[5] = kTileRegisterRows;
      layout.row_bytes[6] = kTileRegisterBytes / 2;
      layout.rows[7] = kTileRegisterRows / 2;
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
    use_ = use;
    rows_ = rows;
  }

 private:
  struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Layout) == 64);

  TileUse use_ = TileUse::Product;
  int rows_ = 0;
};

template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
template <int Tile>
inline void tile_load(const void* from, ptrdiff_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(Tile), "r"(from), "r"(row_bytes) : "memory");
}
template <int Tile>
inline void tile_store(void* to, ptrdiff_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(Tile), "r"(to), "r"(row_bytes) : "memory");
}
// sum [rows, 16] fp32 += x [rows, 32] bf16 times weights [16][16 columns][2]: within the 32, one chain over the even k
// and one over the odd, whose sum is added. Subnormals count as zero.
template <int Sum, int X, int Weights>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(X), "i"(Weights));
}
// sum [rows, 16] int32 += x [rows, 64] signed bytes times weights [16][16 columns][4] unsigned bytes, exact.
template <int Sum, int X, int Weights>
inline void tile_dot_int8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(X), "i"(Weights));
}

}  // namespace kvferry
