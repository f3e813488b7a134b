// Products of floats on AMX tiles. Each float is the sum of two bfloat16, to 2^-17 of its size; of
// the four products of two such sums the three larger ones are added up, in float32.
#pragma once

#include "isa/amx_tiles.h"
#include "isa/floats.h"

namespace localds::amx {

constexpr int kTileDepth = 32;  // columns of a left tile, as bfloat16
constexpr int64_t kTileUnits = kTileRows * kTileBytes / 4;

// 32 bfloat16: `low` in the first half.
LOCALDS_INLINE __m512i to_bfloat16(__m512 low, __m512 high) {
  return std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
LOCALDS_INLINE __m512 first_half(__m512i v) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16));
}
LOCALDS_INLINE __m512 second_half(__m512i v) {
  return first_half(_mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1)));
}

struct Split {
  __m512i large, small;
};
LOCALDS_INLINE Split split(__m512 low, __m512 high) {
  const __m512i large = to_bfloat16(low, high);
  return {large, to_bfloat16(_mm512_sub_ps(low, first_half(large)),
                             _mm512_sub_ps(high, second_half(large)))};
}

LOCALDS_INLINE __m512 load_up_to(const float* p, int64_t count) {
  return count >= kLanes ? _mm512_loadu_ps(p)
                         : load_partial(p, count > 0 ? static_cast<int>(count) : 0);
}

// 32 floats, of which `count` exist; the others are zero.
LOCALDS_INLINE Split split_up_to(const float* p, int64_t count) {
  return split(load_up_to(p, count), load_up_to(p + kLanes, count - kLanes));
}

// Where a tile is: its large and its small parts, in rows `stride` bytes apart.
struct SplitTile {
  const void* large;
  const void* small;
  int64_t stride;
};

// A matrix cut in tiles, [row tiles][column tiles] of two: large parts, then small ones.
struct SplitTiles {
  uint32_t* units;
  int64_t columns;  // column tiles

  uint32_t* at(int64_t i, int64_t j) const { return units + 2 * (i * columns + j) * kTileUnits; }
  SplitTile tile(int64_t i, int64_t j) const {
    return {at(i, j), at(i, j) + kTileUnits, kTileBytes};
  }
};

// x [rows, cols] as left sides. Rows beyond the last are not written: their products go nowhere.
inline void pack_left(const float* x, int64_t rows, int64_t cols, int64_t stride, SplitTiles to) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = x + i * stride;
    uint32_t* out = to.at(i / kTileRows, 0) + i % kTileRows * kLanes;
    for (int64_t j = 0; j < cols; j += kTileDepth, out += 2 * kTileUnits) {
      const Split s = split_up_to(row + j, cols - j);
      _mm512_store_si512(out, s.large);
      _mm512_store_si512(out + kTileUnits, s.small);
    }
  }
}

// x [rows, cols], transposed, as right sides: 16 rows are the columns of a tile.
inline void pack_right_transposed(const float* x, int64_t rows, int64_t cols, int64_t stride,
                                  SplitTiles to) {
  alignas(64) uint32_t large[kTileRows][kLanes] = {}, small[kTileRows][kLanes] = {};
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t count = rows - i < kTileRows ? rows - i : kTileRows;
    for (int64_t j = 0; j < cols; j += kTileDepth) {
      for (int64_t r = 0; r < count; ++r) {
        const Split s = split_up_to(x + (i + r) * stride + j, cols - j);
        _mm512_store_si512(large[r], s.large);
        _mm512_store_si512(small[r], s.small);
      }
      uint32_t* tile = to.at(i / kTileRows, j / kTileDepth);
      for (int q = 0; q < 4; ++q) {
        const auto transpose = [&](const uint32_t (&from)[kTileRows][kLanes], uint32_t* out) {
          interleave(reinterpret_cast<const uint8_t*>(from[0] + 4 * q), kTileBytes,
                     out + 4 * q * kLanes, kLanes, 2 * kLanes);
        };
        transpose(large, tile);
        transpose(small, tile + kTileUnits);
      }
    }
  }
}

// Takes 16 values from `first` on of one vector, and those of a second vector between them.
LOCALDS_INLINE __m512i pair_order(int first) {
  constexpr int kSecond = 32;  // where the second vector begins, for the permutation
  alignas(64) uint16_t order[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    order[2 * i] = static_cast<uint16_t>(first + i);
    order[2 * i + 1] = static_cast<uint16_t>(kSecond + first + i);
  }
  return _mm512_load_si512(order);
}

// x [rows, cols] as right sides: [column tiles][row tiles], pairs of rows side by side. Missing
// rows and columns are zero.
inline void pack_right(const float* x, int64_t rows, int64_t cols, int64_t stride, SplitTiles to) {
  const __m512i pairs = pair_order(0);
  const int64_t padded = tiles_of(rows, kTileDepth) * kTileDepth;
  for (int64_t i = 0; i < padded; i += 2) {
    const float* row = x + i * stride;
    const auto load = [&](int64_t r, int64_t j) {
      return r < rows ? load_up_to(x + r * stride + j, cols - j) : wide(0);
    };
    for (int64_t j = 0; j < cols; j += kTileRows) {
      const bool whole = i + 2 <= rows && j + kLanes <= cols;
      const Split s = whole ? split(_mm512_loadu_ps(row + j), _mm512_loadu_ps(row + stride + j))
                            : split(load(i, j), load(i + 1, j));
      uint32_t* out = to.at(j / kTileRows, i / kTileDepth) + i % kTileDepth / 2 * kLanes;
      const auto pair = [&](__m512i v) {
        const __m256i upper = _mm512_extracti64x4_epi64(v, 1);
        return _mm512_permutex2var_epi16(v, pairs, _mm512_castsi256_si512(upper));
      };
      _mm512_store_si512(out, pair(s.large));
      _mm512_store_si512(out + kTileUnits, pair(s.small));
    }
  }
}

using Sums = float[kTileRows][kLanes];

// Adds left0 . right to tile 0 and left1 . right to tile 1.
LOCALDS_INLINE void add_two_left(SplitTile left0, SplitTile left1, SplitTile right) {
  _tile_loadd(6, right.large, right.stride);
  _tile_loadd(7, right.small, right.stride);
  _tile_loadd(2, left0.large, left0.stride);
  _tile_loadd(4, left1.large, left1.stride);
  _tile_loadd(3, left0.small, left0.stride);
  _tile_loadd(5, left1.small, left1.stride);
  _tile_dpbf16ps(0, 2, 6);
  _tile_dpbf16ps(1, 4, 6);
  _tile_dpbf16ps(0, 2, 7);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(0, 3, 6);
  _tile_dpbf16ps(1, 5, 6);
}

// Adds left . right0 to tile 0 and left . right1 to tile 1.
LOCALDS_INLINE void add_two_right(SplitTile left, SplitTile right0, SplitTile right1) {
  _tile_loadd(2, left.large, left.stride);
  _tile_loadd(3, left.small, left.stride);
  _tile_loadd(4, right0.large, right0.stride);
  _tile_loadd(6, right1.large, right1.stride);
  _tile_loadd(5, right0.small, right0.stride);
  _tile_loadd(7, right1.small, right1.stride);
  _tile_dpbf16ps(0, 2, 4);
  _tile_dpbf16ps(1, 2, 6);
  _tile_dpbf16ps(0, 2, 5);
  _tile_dpbf16ps(1, 2, 7);
  _tile_dpbf16ps(0, 3, 4);
  _tile_dpbf16ps(1, 3, 6);
}

// sums = the products of `depth` tiles each, that add(k) adds to tiles 0 and 1.
template <class Add>
LOCALDS_INLINE void sum_tiles(int64_t depth, Sums (&sums)[2], Add add) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < depth; ++k) add(k);
  _tile_stored(0, sums[0], kTileBytes);
  _tile_stored(1, sums[1], kTileBytes);
}

// Stores sums, transposed, to the first `rows` rows and `columns` columns of c.
inline void store_transposed(const Sums& sums, int64_t rows, int64_t columns, float* c,
                             int64_t ldc) {
  alignas(64) Sums turned;
  for (int q = 0; q < 4; ++q) {
    interleave(reinterpret_cast<const uint8_t*>(sums[0] + 4 * q), kTileBytes,
               reinterpret_cast<uint32_t*>(turned[4 * q]), kLanes, 2 * kLanes);
  }
  const int count = static_cast<int>(columns < kLanes ? columns : kLanes);
  for (int64_t r = 0; r < kTileRows && r < rows; ++r) {
    store_partial(c + r * ldc, load_wide(turned[r]), count);
  }
}

// With fewer rows, splitting the other side into bfloat16 takes longer than the products would.
constexpr int64_t kFewRows = 32;

// c[m, n] = a[m, k] . b[n, k]^T. The tiles hold c transposed: b, of which there is more, needs no
// transposing then.
inline void near_nt(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
  if (m < kFewRows || n < kFewRows) return gemm_nt(m, n, k, a, lda, b, ldb, c, ldc);
  const int64_t depth = tiles_of(k, kTileDepth);
  const int64_t m_tiles = tiles_of(m, kTileRows), n_tiles = tiles_of(n, kTileRows);
  auto* units = static_cast<uint32_t*>(
      thread_scratch(static_cast<size_t>(2 * (m_tiles + n_tiles) * depth * kTileUnits) * 4));
  const SplitTiles right{units, depth};
  const SplitTiles left{units + 2 * m_tiles * depth * kTileUnits, depth};
  pack_right_transposed(a, m, k, lda, right);
  pack_left(b, n, k, ldb, left);

  const TileShapes shapes(kTileBytes);
  alignas(64) Sums sums[2];
  for (int64_t j = 0; j < n_tiles; j += 2) {
    const int64_t second = j + 1 < n_tiles ? j + 1 : j;
    for (int64_t i = 0; i < m_tiles; ++i) {
      sum_tiles(depth, sums, [&](int64_t k) __attribute__((always_inline)) {
        add_two_left(left.tile(j, k), left.tile(second, k), right.tile(i, k));
      });
      for (int64_t part = 0; part <= second - j; ++part) {
        const int64_t column = (j + part) * kTileRows, row = i * kTileRows;
        store_transposed(sums[part], m - row, n - column, c + row * ldc + column, ldc);
      }
    }
  }
}

// c[m, n] += a[m, k] . b[k, n]
inline void near_nn(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
  if (m < kFewRows || n < kFewRows) return gemm_nn(m, n, k, a, lda, b, ldb, c, ldc);
  const int64_t depth = tiles_of(k, kTileDepth);
  const int64_t m_tiles = tiles_of(m, kTileRows), n_tiles = tiles_of(n, kTileRows);
  auto* units = static_cast<uint32_t*>(
      thread_scratch(static_cast<size_t>(2 * (m_tiles + n_tiles) * depth * kTileUnits) * 4));
  const SplitTiles left{units, depth};
  const SplitTiles right{units + 2 * m_tiles * depth * kTileUnits, depth};
  pack_left(a, m, k, lda, left);
  pack_right(b, k, n, ldb, right);

  const TileShapes shapes(kTileBytes);
  alignas(64) Sums sums[2];
  for (int64_t j = 0; j < n_tiles; j += 2) {
    const int64_t second = j + 1 < n_tiles ? j + 1 : j;
    for (int64_t i = 0; i < m_tiles; ++i) {
      sum_tiles(depth, sums, [&](int64_t k) __attribute__((always_inline)) {
        add_two_right(left.tile(i, k), right.tile(j, k), right.tile(second, k));
      });
      for (int64_t part = 0; part <= second - j; ++part) {
        const int64_t column = (j + part) * kTileRows, row = i * kTileRows;
        const int count = static_cast<int>(n - column < kLanes ? n - column : kLanes);
        for (int64_t r = 0; r < kTileRows && row + r < m; ++r) {
          float* to = c + (row + r) * ldc + column;
          store_partial(to, add(load_partial(to, count), load_wide(sums[part][r])), count);
        }
      }
    }
  }
}

}  // namespace localds::amx
