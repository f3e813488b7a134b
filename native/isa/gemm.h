// Products with many tokens. A panel of kLanes rows is decoded once and multiplied with tiles of up
// to kTile tokens that stay in registers. Lanes run along the rows.
//
// Both sides are packed by groups of 32 columns, in 32-bit units (four bytes of one row or token):
//   panel group: bytes [8][kLanes], scales [halves][kLanes], with kMin mins [halves][kLanes]
//   tile group:  bytes [8][T], scales [T], offsets [halves][T]
// An offset is what the weights' offset adds: the float scale * sum that goes with a min, or the
// integer -kZero * sum that the integer dot product starts from.
#pragma once

#include "isa/gemv.h"

namespace localds::LOCALDS_ISA {

constexpr int kUnits = kGroup / 4;

// Tokens packed at a time: enough to pay for decoding, few enough to stay in the second cache.
constexpr int64_t kMaxPacked = 384;

template <class D>
struct Packing {
  static constexpr int kHalfCount = D::kHalves ? 2 : 1;
  static constexpr int kMaxTile = D::kHalves ? kTileHalves : kTile;
  // Sizes of a group, in units.
  static constexpr int64_t kPanelGroup = (kUnits + kHalfCount * (D::kMin ? 2 : 1)) * kLanes;
  static constexpr int64_t tile_group(int tokens) { return (kUnits + 1 + kHalfCount) * tokens; }
};

// Decodes one span of the rows into `units`.
template <class D>
LOCALDS_INLINE void pack_panel_span(const uint8_t* const* rows, int64_t row_bytes, int groups,
                                    uint32_t* units) {
  using P = Packing<D>;
  alignas(64) uint8_t bytes[kLanes][kSpan];
  alignas(64) float scales[kLanes][2 * kSpanGroups], mins[kLanes][2 * kSpanGroups];
  for (int r = 0; r < kLanes; ++r) {
    // The next panel; processors do not foresee so many short streams.
    for (int line = 0; line < D::kSpanBytes; line += 64) {
      prefetch(rows[r] + kLanes * row_bytes + line);
    }
    decode_scales<D>(rows[r], groups, scales[r], mins[r]);
    decode_span<D>(rows[r], groups, bytes[r]);
  }
  for (int g = 0; g < groups; ++g) {
    for (int half = 0; half < 2; ++half) {
      interleave(bytes[0] + chunk_offset<D>(g, half), kSpan,
                 units + g * P::kPanelGroup + half * 4 * kLanes, kLanes, 2 * kLanes);
    }
  }
  const auto pack_floats = [&](const float (&from)[kLanes][2 * kSpanGroups], uint32_t* to) {
    // Four groups at a time, or both halves of two.
    constexpr int kStep = 4 / P::kHalfCount;
    for (int g = 0; g < kSpanGroups; g += kStep) {
      interleave(reinterpret_cast<const uint8_t*>(from[0] + g * P::kHalfCount), sizeof(from[0]),
                 to + g * P::kPanelGroup, D::kHalves ? kLanes : P::kPanelGroup,
                 D::kHalves ? P::kPanelGroup : 2 * P::kPanelGroup);
    }
  };
  pack_floats(scales, units + kUnits * kLanes);
  if constexpr (D::kMin) pack_floats(mins, units + (kUnits + P::kHalfCount) * kLanes);
}

// Decodes the rows [row, row + count), the last one again for the lanes beyond.
template <class D>
void pack_panel(const Matrix& w, int64_t batch, int64_t row, int count, uint32_t* units) {
  const uint8_t* rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = w.row(batch, row + (r < count ? r : count - 1));
  int64_t groups = w.cols / kGroup;
  for (; groups >= kSpanGroups; groups -= kSpanGroups) {
    pack_panel_span<D>(rows, w.row_bytes, kSpanGroups, units);
    for (int r = 0; r < kLanes; ++r) rows[r] += D::kSpanBytes;
    units += kSpanGroups * Packing<D>::kPanelGroup;
  }
  if constexpr (requires { D::kBlockBytes; }) {
    if (groups) pack_panel_span<D>(rows, w.row_bytes, static_cast<int>(groups), units);
  }
}

// Packs four of a tile's tokens; `units` points to the first of them, in a tile of `tile` tokens.
template <class D>
void pack_four_tokens(const Token (&tokens)[4], int64_t cols, int tile, uint32_t* units) {
  using P = Packing<D>;
  const int64_t group_units = P::tile_group(tile);
  const auto pack = [&](auto row, uint32_t* to, int64_t a, int64_t b) {
    transpose4(row(0), row(1), row(2), row(3), to, a, b);
  };
  for (int64_t col = 0; col < cols; col += kSpan, units += kSpanGroups * group_units) {
    uint32_t offsets[4][2 * kSpanGroups];
    for (int t = 0; t < 4; ++t) {
      const int16_t* sum = tokens[t].sum + col / kHalfGroup;
      const float* scale = tokens[t].scale + col / kGroup;
      for (int i = 0; i < P::kHalfCount * kSpanGroups; ++i) {
        const int total = D::kHalves ? sum[i] : sum[2 * i] + sum[2 * i + 1];
        offsets[t][i] =
            D::kMin ? std::bit_cast<uint32_t>(static_cast<float>(total) * scale[i / P::kHalfCount])
                    : static_cast<uint32_t>(-D::kZero * total);
      }
    }
    for (int g = 0; g < kSpanGroups; ++g) {
      for (int half = 0; half < 2; ++half) {
        pack([&](int t) { return tokens[t].q + col + kGroup * g + kHalfGroup * half; },
             units + g * group_units + half * 4 * tile, tile, 2 * tile);
      }
    }
    uint32_t* scales = units + kUnits * tile;
    for (int g = 0; g < kSpanGroups; g += 4) {
      pack([&](int t) { return tokens[t].scale + col / kGroup + g; }, scales + g * group_units,
           group_units, 2 * group_units);
    }
    constexpr int kStep = 4 / P::kHalfCount;
    for (int g = 0; g < kSpanGroups; g += kStep) {
      pack([&](int t) { return offsets[t] + g * P::kHalfCount; }, scales + tile + g * group_units,
           D::kHalves ? tile : group_units, D::kHalves ? group_units : 2 * group_units);
    }
  }
}

// The dot products of `units` (a half or a whole group) with T tokens.
template <class D, int T, int units>
LOCALDS_INLINE void tile_dot(const uint32_t* panel, const uint32_t* tile, const uint32_t* start,
                             WideInts (&dots)[T]) {
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) dots[t] = D::kMin ? WideInts() : broadcast4(start + t);
#pragma GCC unroll 4
  for (int i = 0; i < units; i += 2) {
    const WideInts w0 = load_wide_bytes(panel + i * kLanes);
    const WideInts w1 = load_wide_bytes(panel + (i + 1) * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const uint32_t* x = tile + i * T + t;
      dots[t] = dot_two<D::kWide>(dots[t], w0, broadcast4(x), w1, broadcast4(x + T));
    }
  }
}

// Multiplies a panel with a tile; row t of `out` gets the first `rows` lanes, for t < `tokens`.
template <class D, int T>
void multiply_tile(const uint32_t* panel, const uint32_t* tile, int64_t groups, int rows,
                   int64_t tokens, float* out, int64_t out_stride) {
  using P = Packing<D>;
  Wide sums[T];
  for (int t = 0; t < T; ++t) sums[t] = wide(0);
  for (int64_t g = 0; g < groups; ++g, panel += P::kPanelGroup, tile += P::tile_group(T)) {
    const auto* factors = reinterpret_cast<const float*>(panel + kUnits * kLanes);
    const auto* scales = reinterpret_cast<const float*>(tile + kUnits * T);
    const uint32_t* offsets = tile + (kUnits + 1) * T;
    WideInts dots[T];
    Wide parts[T];
    tile_dot<D, T, kUnits / P::kHalfCount>(panel, tile, offsets, dots);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) parts[t] = multiply(to_floats(dots[t]), load_wide(factors));
    if constexpr (D::kHalves) {
      constexpr int kHalfUnits = kUnits / 2;
      tile_dot<D, T, kHalfUnits>(panel + kHalfUnits * kLanes, tile + kHalfUnits * T, offsets + T,
                                 dots);
      const Wide second = load_wide(factors + kLanes);
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) parts[t] = fma(to_floats(dots[t]), second, parts[t]);
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) sums[t] = fma(parts[t], wide(scales[t]), sums[t]);
    if constexpr (D::kMin) {
      for (int h = 0; h < P::kHalfCount; ++h) {
        const Wide min = load_wide(factors + (P::kHalfCount + h) * kLanes);
        const auto* offset = reinterpret_cast<const float*>(offsets + h * T);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) sums[t] = fma(min, wide(offset[t]), sums[t]);
      }
    }
  }
  for (int t = 0; t < T && t < tokens; ++t) store_partial(out + t * out_stride, sums[t], rows);
}

template <class D>
LOCALDS_INLINE void multiply_tile_of(int size, const uint32_t* panel, const uint32_t* tile,
                                     int64_t groups, int rows, int64_t tokens, float* out,
                                     int64_t out_stride) {
  constexpr int kMax = Packing<D>::kMaxTile;
  if constexpr (kMax >= 12) {
    if (size == 12) return multiply_tile<D, 12>(panel, tile, groups, rows, tokens, out, out_stride);
  }
  if constexpr (kMax >= 8) {
    if (size == 8) return multiply_tile<D, 8>(panel, tile, groups, rows, tokens, out, out_stride);
  }
  multiply_tile<D, 4>(panel, tile, groups, rows, tokens, out, out_stride);
}

// Calls body(first token, size) for the tiles of n tokens; sizes are multiples of 4.
template <class D, class Body>
LOCALDS_INLINE void for_tiles(int64_t n, Body body) {
  constexpr int kMax = Packing<D>::kMaxTile;
  for (int64_t i = 0; i < n; i += kMax) {
    body(i, n - i >= kMax ? kMax : static_cast<int>((n - i + 3) / 4 * 4));
  }
}

template <class D>
void gemm_chunk(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
                const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  using P = Packing<D>;
  const int64_t groups = w.cols / kGroup;
  const int64_t padded_groups = (groups + kSpanGroups - 1) / kSpanGroups * kSpanGroups;
  const int64_t panel_units = padded_groups * P::kPanelGroup;
  const int64_t token_units = padded_groups * P::tile_group(1);
  auto* panel = static_cast<uint32_t*>(
      thread_scratch(static_cast<size_t>(panel_units + (n + 3) / 4 * 4 * token_units) * 4));
  uint32_t* packed = panel + panel_units;

  for_tiles<D>(n, [&](int64_t i, int size) {
    for (int t = 0; t < size; t += 4) {
      Token four[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t k = i + t + j < n ? i + t + j : n - 1;
        four[j] = token_at(x, x.q, tokens ? tokens[k] : k);
      }
      pack_four_tokens<D>(four, w.cols, size, packed + i * token_units + t);
    }
  });
  for (int64_t r = row0; r < row1; r += kLanes) {
    const int rows = row1 - r < kLanes ? static_cast<int>(row1 - r) : kLanes;
    pack_panel<D>(w, batch, r, rows, panel);
    for_tiles<D>(n, [&](int64_t i, int size) {
      multiply_tile_of<D>(size, panel, packed + i * token_units, groups, rows, n - i,
                          out + i * out_stride + r - row0, out_stride);
    });
  }
}

// body(x, tokens, first, count) for as many of the n tokens as are packed at a time; `x` and
// `tokens` begin with the first of them.
template <class Body>
LOCALDS_INLINE void for_packed(int64_t n, const Activations& x, const int32_t* tokens, Body body) {
  for (int64_t i = 0; i < n; i += kMaxPacked) {
    Activations rest = x;
    if (!tokens) {
      rest.q += i * x.q_stride;
      rest.scale += i * x.q_stride / kGroup;
      rest.sum += i * x.q_stride / kHalfGroup;
    }
    body(rest, tokens ? tokens + i : nullptr, i, n - i < kMaxPacked ? n - i : kMaxPacked);
  }
}

template <class D>
void gemm_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
               const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  for_packed(n, x, tokens,
             [&](const Activations& part, const int32_t* list, int64_t first, int64_t count) {
               gemm_chunk<D>(w, batch, row0, row1, part, list, count, out + first * out_stride,
                             out_stride);
             });
}

}  // namespace localds::LOCALDS_ISA
