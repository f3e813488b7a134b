// Intel's matrix tiles (AMX): eight registers of 16 rows of 64 bytes. A product adds, to 16 x 16
// sums, rows of one tile times the columns of another, whose rows hold four bytes (two bfloat16) of
// each of 16 columns.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa/tables.h"

namespace localds::amx {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;

inline int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Shapes the tiles of this thread for the lifetime of the object: 0 to 3 sums, 4 and 5 left sides
// of `depth` bytes a row, 6 and 7 right sides of as many bytes a column. With kTileBytes all are
// alike.
class TileShapes {
 public:
  explicit TileShapes(int depth) {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth : kTileBytes);
      config.rows[i] = static_cast<uint8_t>(i >= 6 ? depth / 4 : kTileRows);
    }
    _tile_loadconfig(&config);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64);
};

}  // namespace localds::amx
