// Products of int8 with many tokens on AMX tiles: the panels of isa/gemm.h on the right, tiles of
// 16 tokens on the left. Sums of a group are whole numbers and scaled in the same order, so the
// results are those of AVX-512, bit for bit. Only for types with a scale per 32.
//
// A token tile is packed by groups of 32 columns: bytes [16][32], scales [16], offsets [16] (see
// isa/gemm.h).
#pragma once

#include "isa/amx_tiles.h"
#include "isa/gemm.h"

namespace localds::amx {

constexpr int kByteUnits = kTileRows * kGroup / 4;

constexpr int64_t kTokenGroup = kByteUnits + 2 * kTileRows;

// Packs up to 16 tokens; `count` of them exist, the last one stands in for the others.
template <class D>
void pack_token_tile(const Activations& x, const int32_t* tokens, int64_t first, int64_t count,
                     int64_t groups, uint32_t* units) {
  for (int t = 0; t < kTileRows; ++t) {
    const int64_t i = first + (t < count ? t : count - 1);
    const Token token = token_at(x, x.q, tokens ? tokens[i] : i);
    uint32_t* to = units;
    for (int64_t g = 0; g < groups; ++g, to += kTokenGroup) {
      store_bytes(to + t * kUnits, load_bytes(token.q + g * kGroup));
      const float scale = token.scale[g];
      to[kByteUnits + t] = std::bit_cast<uint32_t>(scale);
      const int total = token.sum[2 * g] + token.sum[2 * g + 1];
      to[kByteUnits + kTileRows + t] =
          D::kMin ? std::bit_cast<uint32_t>(static_cast<float>(total) * scale)
                  : static_cast<uint32_t>(-D::kZero * total);
    }
  }
}

using Dots = int32_t[kTileRows][kLanes];

// Products of a group, through the sums of tile 0 or 1.
template <int sums>
LOCALDS_INLINE void tile_products(const uint32_t* tokens, const uint32_t* panel, Dots& dots) {
  static_assert(sums == 0 || sums == 1);
  if constexpr (sums == 0) {
    _tile_zero(0);
    _tile_loadd(4, tokens, kGroup);
    _tile_loadd(6, panel, kTileBytes);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, dots, kTileBytes);
  } else {
    _tile_zero(1);
    _tile_loadd(5, tokens, kGroup);
    _tile_loadd(7, panel, kTileBytes);
    _tile_dpbsud(1, 5, 7);
    _tile_stored(1, dots, kTileBytes);
  }
}

// Adds the scaled products of a group.
template <class D>
LOCALDS_INLINE void add_group(const uint32_t* panel, const uint32_t* tile, const Dots& dots,
                              Wide (&sums)[kTileRows]) {
  const auto* factors = reinterpret_cast<const float*>(panel + kUnits * kLanes);
  const auto* scales = reinterpret_cast<const float*>(tile + kByteUnits);
  const uint32_t* offsets = tile + kByteUnits + kTileRows;
  const Wide factor = load_wide(factors);
#pragma GCC unroll 16
  for (int t = 0; t < kTileRows; ++t) {
    WideInts dot = _mm512_load_si512(dots[t]);
    if constexpr (!D::kMin && D::kZero != 0) dot = _mm512_add_epi32(dot, broadcast4(offsets + t));
    sums[t] = fma(multiply(to_floats(dot), factor), wide(scales[t]), sums[t]);
    if constexpr (D::kMin) {
      const auto* offset = reinterpret_cast<const float*>(offsets);
      sums[t] = fma(load_wide(factors + kLanes), wide(offset[t]), sums[t]);
    }
  }
}

// Multiplies a panel with a token tile; row t of `out` gets the first `rows` lanes, for t <
// `tokens`.
template <class D>
void multiply_token_tile(const uint32_t* panel, const uint32_t* tile, int64_t groups, int rows,
                         int64_t tokens, float* out, int64_t out_stride) {
  constexpr int64_t kPanel = Packing<D>::kPanelGroup;
  const auto multiply_two = [&](int64_t g, Dots(&dots)[2]) {
    const uint32_t* left = tile + g * kTokenGroup;
    const uint32_t* right = panel + g * kPanel;
    tile_products<0>(left, right, dots[0]);
    if (g + 1 < groups) tile_products<1>(left + kTokenGroup, right + kPanel, dots[1]);
  };

  Wide sums[kTileRows];
#pragma GCC unroll 16
  for (Wide& sum : sums) sum = wide(0);
  // Two groups are multiplied before the two ahead of them are added: what was just stored from a
  // tile cannot be loaded at once.
  alignas(64) Dots dots[2][2];
  multiply_two(0, dots[0]);
  for (int64_t g = 0, buffer = 0; g < groups; g += 2, buffer ^= 1) {
    if (g + 2 < groups) multiply_two(g + 2, dots[buffer ^ 1]);
    for (int64_t i = 0; i < 2 && g + i < groups; ++i) {
      add_group<D>(panel + (g + i) * kPanel, tile + (g + i) * kTokenGroup, dots[buffer][i], sums);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTileRows; ++t) {
    if (t < tokens) store_partial(out + t * out_stride, sums[t], rows);
  }
}

template <class D>
void gemm_tiles(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
                const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  const int64_t groups = w.cols / kGroup;
  const int64_t padded_groups = (groups + kSpanGroups - 1) / kSpanGroups * kSpanGroups;
  const int64_t panel_units = padded_groups * Packing<D>::kPanelGroup;
  const int64_t tile_units = groups * kTokenGroup;
  const int64_t tiles = tiles_of(n, kTileRows);
  auto* panel = static_cast<uint32_t*>(
      thread_scratch(static_cast<size_t>(panel_units + tiles * tile_units) * 4));
  uint32_t* packed = panel + panel_units;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * kTileRows;
    pack_token_tile<D>(x, tokens, first, n - first, groups, packed + i * tile_units);
  }
  const TileShapes shapes(kGroup);
  for (int64_t r = row0; r < row1; r += kLanes) {
    const int rows = row1 - r < kLanes ? static_cast<int>(row1 - r) : kLanes;
    pack_panel<D>(w, batch, r, rows, panel);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = i * kTileRows;
      multiply_token_tile<D>(panel, packed + i * tile_units, groups, rows, n - first,
                             out + first * out_stride + r - row0, out_stride);
    }
  }
}

}  // namespace localds::amx
