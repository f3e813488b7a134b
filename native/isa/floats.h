// The float kernels: products of float rows, and the elementwise functions.
#pragma once

#include <cmath>

#include "isa/decoders.h"
#include "isa/tables.h"

namespace localds::LOCALDS_ISA {

// Calls body with each vector position of [0, n) and its lane count: kLanes, less for the last.
template <class Body>
LOCALDS_INLINE void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

LOCALDS_INLINE Wide load_lanes(const float* p, int count) {
  return count == kLanes ? load_wide(p) : load_partial(p, count);
}
LOCALDS_INLINE void store_lanes(float* p, Wide v, int count) {
  count == kLanes ? store_wide(p, v) : store_partial(p, v, count);
}

// How a row of the right side is stored: floats that are in a cache, or a row of weights that comes
// from memory and is fetched ahead.
struct CachedFloats {
  LOCALDS_INLINE static Wide load(const uint8_t* row, int64_t i, int count) {
    return load_lanes(reinterpret_cast<const float*>(row) + i, count);
  }
};
struct Float32Row {
  LOCALDS_INLINE static Wide load(const uint8_t* row, int64_t i, int count) {
    prefetch(row + 4 * i + kAhead);
    prefetch_near(row + 4 * i + kNear);
    return CachedFloats::load(row, i, count);
  }
};
template <Wide (*load_wide_of)(const uint8_t*)>
struct TwoByteRow {
  LOCALDS_INLINE static Wide load(const uint8_t* row, int64_t i, int count) {
    prefetch(row + 2 * i + kAhead);
    prefetch_near(row + 2 * i + kNear);
    if (count == kLanes) return load_wide_of(row + 2 * i);
    uint8_t copy[2 * kLanes] = {};
    std::memcpy(copy, row + 2 * i, static_cast<size_t>(2 * count));
    return load_wide_of(copy);
  }
};
using Float16Row = TwoByteRow<load_wide_half>;
using Bfloat16Row = TwoByteRow<load_wide_bfloat16>;

// M rows of a times N rows of b, transposed. Each product has the same order of additions
// whatever the tile, so that results do not depend on how rows are grouped.
template <class Row, int M, int N>
LOCALDS_INLINE void nt_tile(const float* const* a, const uint8_t* const* b, int64_t k, float* c,
                            int64_t ldc) {
  Wide sums[M][4];
  for (auto& row : sums) {
    for (Wide& sum : row) sum = wide(0);
  }
  for_vectors(k, [&](int64_t p, int count) __attribute__((always_inline)) {
    Wide right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = Row::load(b[j], p, count);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const Wide left = load_lanes(a[i] + p, count);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  });
  for (int i = 0; i < M; ++i) {
    float four[4];
    store4(four, horizontal_sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    for (int j = 0; j < N; ++j) c[i * ldc + j] = four[j];
  }
}

// The same for m <= M rows of a and n <= N rows of b.
template <class Row, int M, int N>
LOCALDS_INLINE void nt_tile_of(int m, int n, const float* const* a, const uint8_t* const* b,
                               int64_t k, float* c, int64_t ldc) {
  if (m == M && n == N) return nt_tile<Row, M, N>(a, b, k, c, ldc);
  if constexpr (M > 1) {
    if (m < M) return nt_tile_of<Row, M - 1, N>(m, n, a, b, k, c, ldc);
  }
  if constexpr (N > 1) {
    if (n < N) return nt_tile_of<Row, M, N - 1>(m, n, a, b, k, c, ldc);
  }
}

// c[m, n] = a . b^T for up to kNtRows rows of a and rows of b that are `stride` bytes apart.
template <class Row>
void nt_rows(int m, const float* const* a, int64_t n, const uint8_t* b, int64_t stride, int64_t k,
             float* c, int64_t ldc) {
  static_assert(kNtCols == 4);
  for (int64_t j = 0; j < n; j += kNtCols) {
    const uint8_t* rows[kNtCols];
    const int count = n - j < kNtCols ? static_cast<int>(n - j) : kNtCols;
    for (int i = 0; i < count; ++i) rows[i] = b + (j + i) * stride;
    nt_tile_of<Row, kNtRows, kNtCols>(m, count, a, rows, k, c + j, ldc);
  }
}

inline void gemm_nt(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i += kNtRows) {
    const float* rows[kNtRows];
    const int count = m - i < kNtRows ? static_cast<int>(m - i) : kNtRows;
    for (int j = 0; j < count; ++j) rows[j] = a + (i + j) * lda;
    nt_rows<CachedFloats>(count, rows, n, reinterpret_cast<const uint8_t*>(b),
                          ldb * static_cast<int64_t>(sizeof(float)), k, c + i * ldc, ldc);
  }
}

// c[M, count] += a[M, k] . b[k, count], count up to kNnVectors vectors.
template <int M>
LOCALDS_INLINE void nn_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                            float* c, int64_t ldc, int count) {
  const auto lanes = [&](int v) {
    const int rest = count - v * kLanes;
    return rest < 0 ? 0 : rest < kLanes ? rest : kLanes;
  };
  Wide sums[M][kNnVectors];
  const bool whole = count == kNnVectors * kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < kNnVectors; ++v) sums[i][v] = wide(0);
  }
  for (int64_t p = 0; p < k; ++p, b += ldb) {
    Wide right[kNnVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kNnVectors; ++v) {
      right[v] = whole ? load_wide(b + v * kLanes) : load_partial(b + v * kLanes, lanes(v));
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Wide left = wide(a[i * lda + p]);
      for (int v = 0; v < kNnVectors; ++v) sums[i][v] = fma(left, right[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < kNnVectors; ++v) {
      float* to = c + i * ldc + v * kLanes;
      store_partial(to, add(load_partial(to, lanes(v)), sums[i][v]), lanes(v));
    }
  }
}

template <int M>
inline void nn_rows(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                    float* c, int64_t ldc, int count) {
  int64_t i = 0;
  for (; i + M <= m; i += M) nn_tile<M>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, count);
  if constexpr (M > 1) {
    if (i < m) nn_rows<M / 2>(m - i, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, count);
  }
}

inline void gemm_nn(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
  constexpr int64_t kWidth = kNnVectors * kLanes;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int count = static_cast<int>(n - j < kWidth ? n - j : kWidth);
    nn_rows<kNnRows>(m, k, a, lda, b + j, ldb, c + j, ldc, count);
  }
}

LOCALDS_INLINE float total(Wide v) {
  float four[4];
  store4(four, horizontal_sum4(v, v, v, v));
  return four[0];
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  // Four sums hide the latency of the additions; in double, so that long rows lose nothing.
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += 1024) {
    const int64_t size = n - begin < 1024 ? n - begin : 1024;
    Wide sum = wide(0);
    for_vectors(size, [&](int64_t i, int count) {
      const Wide v = load_lanes(x + begin + i, count);
      sum = fma(v, v, sum);
    });
    squares += static_cast<double>(total(sum));
  }
  const Wide factor =
      wide(static_cast<float>(1 / std::sqrt(squares / static_cast<double>(n) + eps)));
  for_vectors(n, [&](int64_t i, int count) {
    const Wide v = multiply(load_lanes(x + i, count), factor);
    store_lanes(out + i, multiply(v, load_lanes(weight + i, count)), count);
  });
}

// exp, to about 1e-7 relative: 2^n times a polynomial for the rest, |rest| <= ln(2) / 2. Taylor
// terms to the seventh power leave 5e-9.
LOCALDS_INLINE Wide exponential(Wide x) {
  // Beyond these the result is 0 or infinity in float; NaN stays NaN.
  x = minimum(wide(89.0f), maximum(wide(-105.0f), x));
  const Wide n = round_nearest(multiply(x, wide(1.44269504f)));
  // ln(2) in two parts, the first short enough that n times it is exact.
  Wide r = fma(n, wide(-0.693359375f), x);
  r = fma(n, wide(2.12194440e-4f), r);
  Wide p = wide(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = fma(p, r, wide(c));
  }
  return scale_by_power(p, n);
}

inline void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int count) {
    const Wide g = load_lanes(gate + i, count), one = wide(1);
    const Wide silu = divide(g, add(one, exponential(subtract(wide(0), g))));
    store_lanes(out + i, multiply(silu, load_lanes(up + i, count)), count);
  });
}

inline float exp_sum(float* x, int64_t n, float max) {
  Wide sum = wide(0);
  float rest = 0;
  for_vectors(n, [&](int64_t i, int count) {
    const Wide e = exponential(subtract(load_lanes(x + i, count), wide(max)));
    store_lanes(x + i, e, count);
    if (count == kLanes) {
      sum = add(sum, e);
    } else {
      for (int j = 0; j < count; ++j) rest += x[i + j];
    }
  });
  return total(sum) + rest;
}

inline void axpy(float a, const float* x, int64_t n, float* y) {
  for_vectors(n, [&](int64_t i, int count) {
    store_lanes(y + i, fma(wide(a), load_lanes(x + i, count), load_lanes(y + i, count)), count);
  });
}

inline void scale(float a, int64_t n, float* x) {
  for_vectors(n, [&](int64_t i, int count) {
    store_lanes(x + i, multiply(wide(a), load_lanes(x + i, count)), count);
  });
}

}  // namespace localds::LOCALDS_ISA
