// Attention on AMX tiles over cached F16 rows that are keys and, in their first columns, values:
// the form that multi-head latent attention has while decoding. A row is split into bfloat16 once
// for all heads, and exactly: two of them hold every float16.
#pragma once

#include "isa/amx_floats.h"

namespace localds::amx {

// The large parts of up to 64 rows, then their small parts, row by row.
struct Planes {
  uint16_t* large;
  uint16_t* small;
  int64_t stride;  // columns, and some more: rows of 1 or 4 KB would share a few sets of the cache

  int64_t row_bytes() const { return stride * static_cast<int64_t>(sizeof(uint16_t)); }
};

constexpr int64_t kBlockRows = 64;

inline int64_t plane_stride(int64_t width) {
  return tiles_of(width, kTileDepth) * kTileDepth + kTileDepth;
}
inline Planes planes_at(void* block, int64_t width) {
  const int64_t stride = plane_stride(width);
  auto* large = static_cast<uint16_t*>(block);
  return {large, large + kBlockRows * stride, stride};
}

inline int64_t tiled_query_bytes(int64_t m, int64_t key_width) {
  return 2 * tiles_of(m, kTileRows) * tiles_of(key_width, kTileDepth) * kTileUnits * 4;
}
inline int64_t tiled_block_bytes(int64_t key_width) {
  return 2 * kBlockRows * plane_stride(key_width) * static_cast<int64_t>(sizeof(uint16_t));
}

inline void tiled_queries(const float* q, int64_t m, int64_t key_width, void* packed) {
  const SplitTiles tiles{static_cast<uint32_t*>(packed), tiles_of(key_width, kTileDepth)};
  pack_right_transposed(q, m, key_width, key_width, tiles);
}

// Rows up to the next whole tile are zero.
inline void tiled_block(const uint8_t* rows, int64_t row_bytes, int64_t n, int64_t width,
                        void* block) {
  const Planes planes = planes_at(block, width);
  const auto load = [width](const uint8_t* row, int64_t j) {
    if (j + kLanes <= width) return load_wide_half(row + 2 * j);
    alignas(32) uint8_t copy[2 * kLanes] = {};
    if (j < width) std::memcpy(copy, row + 2 * j, static_cast<size_t>(2 * (width - j)));
    return load_wide_half(copy);
  };
  const int64_t padded = tiles_of(n, kTileDepth) * kTileDepth;
  for (int64_t r = 0; r < padded; ++r, rows += row_bytes) {
    uint16_t* large = planes.large + r * planes.stride;
    uint16_t* small = planes.small + r * planes.stride;
    for (int64_t j = 0; j < width; j += kTileDepth) {
      Split s{};
      if (r < n) {
        prefetch(rows + 2 * j + kAhead);
        s = split(load(rows, j), load(rows, j + kLanes));
      }
      _mm512_storeu_si512(large + j, s.large);
      _mm512_storeu_si512(small + j, s.small);
    }
  }
}

// c[m, n] = queries . keys^T, for m a multiple of 16.
inline void tiled_scores(const void* queries, int64_t m, void* block, int64_t n, int64_t key_width,
                         float* c, int64_t ldc) {
  const Planes planes = planes_at(block, key_width);
  const int64_t depth = tiles_of(key_width, kTileDepth), stride = planes.row_bytes();
  const SplitTiles right{static_cast<uint32_t*>(const_cast<void*>(queries)), depth};
  const TileShapes shapes(kTileBytes);
  alignas(64) Sums sums[2];
  const auto keys = [&](int64_t row, int64_t k) __attribute__((always_inline)) {
    const int64_t at = row * planes.stride + k * kTileDepth;
    return SplitTile{planes.large + at, planes.small + at, stride};
  };
  for (int64_t j = 0; j < n; j += 2 * kTileRows) {
    for (int64_t i = 0; i < m; i += kTileRows) {
      sum_tiles(depth, sums, [&](int64_t k) __attribute__((always_inline)) {
        add_two_left(keys(j, k), keys(j + kTileRows, k), right.tile(i / kTileRows, k));
      });
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t column = j + part * kTileRows;
        if (column < n) store_transposed(sums[part], m - i, n - column, c + i * ldc + column, ldc);
      }
    }
  }
}

// 32 columns of 32 rows of a plane as two right sides.
LOCALDS_INLINE void right_sides(const uint16_t* plane, int64_t stride, uint32_t* first,
                                uint32_t* second) {
  const __m512i low = pair_order(0), high = pair_order(kLanes);
#pragma GCC unroll 16
  for (int p = 0; p < kTileRows; ++p, plane += 2 * stride) {
    const __m512i even = _mm512_loadu_si512(plane), odd = _mm512_loadu_si512(plane + stride);
    _mm512_store_si512(first + p * kLanes, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(second + p * kLanes, _mm512_permutex2var_epi16(even, high, odd));
  }
}

// context[m, value_width] += weights[m, n] . values, for m a multiple of 16.
inline void tiled_values(const float* weights, int64_t ldw, int64_t m, void* block, int64_t n,
                         int64_t key_width, int64_t value_width, float* context) {
  constexpr int64_t kMostTiles = kBlockRows / kTileDepth;
  const Planes planes = planes_at(block, key_width);
  const int64_t depth = tiles_of(n, kTileDepth), context_bytes = value_width * 4;
  const SplitTiles left{
      static_cast<uint32_t*>(thread_scratch(static_cast<size_t>(tiled_query_bytes(m, kBlockRows)))),
      depth};
  pack_left(weights, m, n, ldw, left);

  const TileShapes shapes(kTileBytes);
  alignas(64) uint32_t right[2][kMostTiles][2][kTileUnits];  // two column tiles
  for (int64_t j = 0; j < value_width; j += 2 * kTileRows) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t at = k * kTileDepth * planes.stride + j;
      right_sides(planes.large + at, planes.stride, right[0][k][0], right[1][k][0]);
      right_sides(planes.small + at, planes.stride, right[0][k][1], right[1][k][1]);
    }
    for (int64_t i = 0; i < m; i += kTileRows) {
      float* to = context + i * value_width + j;
      _tile_loadd(0, to, context_bytes);
      _tile_loadd(1, to + kTileRows, context_bytes);
      for (int64_t k = 0; k < depth; ++k) {
        add_two_right(left.tile(i / kTileRows, k), {right[0][k][0], right[0][k][1], kTileBytes},
                      {right[1][k][0], right[1][k][1], kTileBytes});
      }
      _tile_stored(0, to, context_bytes);
      _tile_stored(1, to + kTileRows, context_bytes);
    }
  }
}

inline constexpr TiledAttention kTiledAttention = {
    .query_bytes = tiled_query_bytes,
    .block_bytes = tiled_block_bytes,
    .pack_queries = tiled_queries,
    .pack_block = tiled_block,
    .scores = tiled_scores,
    .add_values = tiled_values,
};

}  // namespace localds::amx
