// Rows of one layer's attention cache, in memory that belongs to the caller.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace localds {

struct CacheRows {
  uint8_t* data;
  int64_t capacity;
  int64_t row_bytes;
  Type type;      // F32, F16 or Q8_0
  int64_t width;  // values in a row

  uint8_t* row(int64_t i) const { return data + i * row_bytes; }
  bool rounded() const { return type != Type::F32; }
};

// Throws std::invalid_argument unless the cache has rows of `width` values, reads in slices of
// `slice` values, and has room for `n` rows from `past` on.
void check_cache(const CacheRows& cache, int64_t width, int64_t slice, int64_t past, int64_t n);

struct FloatTile {
  const float* data;
  int64_t stride;
};

// Columns [col, col + width) of rows [row0, row1) as floats; `buffer` has room for them.
FloatTile read_cache(const CacheRows& cache, int64_t row0, int64_t row1, int64_t col, int64_t width,
                     float* buffer);

}  // namespace localds
