// Types with blocks of 32 weights: one scale, perhaps a min, then the integers. A group is a block.
#pragma once

#include "quantize/fit.h"

namespace localds::LOCALDS_QUANTIZE {

using Block32 = Groups<32>;

LANES_INLINE void pack_nibbles(uint8_t (&qs)[16], const uint8_t* n) {
  for (int j = 0; j < 16; ++j) qs[j] = static_cast<uint8_t>((n[j] & 15) | (n[j + 16] & 15) << 4);
}
LANES_INLINE void pack_fifth_bits(uint8_t (&qh)[4], const uint8_t* n) {
  for (int byte = 0; byte < 4; ++byte) {
    int bits = 0;
    for (int j = 0; j < 8; ++j) bits |= (n[8 * byte + j] >> 4 & 1) << j;
    qh[byte] = static_cast<uint8_t>(bits);
  }
}

// The nearest values of the grid under the scales as stored, as nibbles or five bits from `zero`.
template <class Grid>
LANES_INLINE void encode(const Block32& groups, Lanes scale, Codes<32>& codes, float zero) {
  const Lanes inverse = ratio(fill(1.0f), scale);
  for (int j = 0; j < 32; ++j) codes.store(j, Grid::nearest(groups.x[j] * inverse) + zero);
}

// `unit` is what the groups' weights were divided by; blocks go to out[0 .. count).

template <class Block, int kZero>
struct SmallSymmetric {  // Q4_0, Q5_0
  static void write(const Block32& groups, Lanes unit, int count, Block* out) {
    using Grid = IntegerGrid<-kZero, kZero - 1>;
    const Lanes fitted = fit_scale<Grid>(groups) * unit;
    Codes<32> codes;
    encode<Grid>(groups, ratio(through_half(fitted), unit), codes, kZero);
    for (int l = 0; l < count; ++l) {
      const auto* n = reinterpret_cast<const uint8_t*>(codes.of[l]);
      out[l].d = to_half(fitted[l]);
      pack_nibbles(out[l].qs, n);
      if constexpr (kZero == 16) pack_fifth_bits(out[l].qh, n);
    }
  }
};

template <class Block, int kTop>
struct SmallAffine {  // Q4_1, Q5_1
  static void write(const Block32& groups, Lanes unit, int count, Block* out) {
    const Affine fitted = fit_affine<kTop, false>(groups);
    const Lanes scale = fitted.scale * unit, offset = fitted.offset * unit;
    const Lanes inverse = ratio(unit, through_half(scale));
    const Lanes origin = ratio(through_half(offset), unit);
    Codes<32> codes;
    for (int j = 0; j < 32; ++j) {
      codes.store(j, nearest_integer(clamp((groups.x[j] - origin) * inverse, 0, kTop)));
    }
    for (int l = 0; l < count; ++l) {
      const auto* n = reinterpret_cast<const uint8_t*>(codes.of[l]);
      out[l].d = to_half(scale[l]);
      out[l].m = to_half(offset[l]);
      pack_nibbles(out[l].qs, n);
      if constexpr (kTop == 31) pack_fifth_bits(out[l].qh, n);
    }
  }
};

struct SmallIq4 {  // IQ4_NL
  static void write(const Block32& groups, Lanes unit, int count, BlockIQ4_NL* out) {
    const Lanes fitted = fit_scale<Iq4Grid>(groups) * unit;
    Codes<32> codes;
    encode<Iq4Grid>(groups, ratio(through_half(fitted), unit), codes, 0);
    for (int l = 0; l < count; ++l) {
      uint8_t n[32];
      for (int j = 0; j < 32; ++j) n[j] = kIq4Nibbles.nibble[static_cast<uint8_t>(codes.of[l][j])];
      out[l].d = to_half(fitted[l]);
      pack_nibbles(out[l].qs, n);
    }
  }
};

// The scale is a power of two: of the few that can be best, the one with the least error.
struct SmallFp4 {  // MXFP4
  static void write(const Block32& groups, Lanes unit, int count, BlockMXFP4* out) {
    Lanes largest = {};
    for (int j = 0; j < 32; ++j) largest = larger(largest, magnitude(groups.x[j]));
    // 2^(e - 128) * 12 is the largest value of a block: e - 128 is about log2(largest / 12).
    uint8_t first[kLanes], best[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t bits = std::bit_cast<uint32_t>(largest[l] * unit[l] * (1.0f / 12));
      const int exponent = static_cast<int>(bits >> 23) + 1;  // biased as e is
      first[l] = static_cast<uint8_t>(exponent < 1 ? 0 : exponent > 251 ? 250 : exponent - 1);
    }
    Lanes best_error = fill(INFINITY), best_scale = {};
    for (int step = 0; step < 3; ++step) {
      Lanes scale;
      for (int l = 0; l < kLanes; ++l) {
        scale[l] = e8m0_half_to_float(static_cast<uint8_t>(first[l] + step)) / unit[l];
      }
      const Lanes inverse = ratio(fill(1.0f), scale);
      Lanes error = {};
      for (int j = 0; j < 32; ++j) {
        const Lanes left = groups.x[j] - scale * Fp4Grid::nearest(groups.x[j] * inverse);
        error += groups.w[j] * left * left;
      }
      const Mask better = error < best_error;
      best_error = select(better, error, best_error);
      best_scale = select(better, scale, best_scale);
      for (int l = 0; l < kLanes; ++l) {
        if (better[l]) best[l] = static_cast<uint8_t>(first[l] + step);
      }
    }
    Codes<32> codes;
    encode<Fp4Grid>(groups, best_scale, codes, 0);
    for (int l = 0; l < count; ++l) {
      uint8_t n[32];
      for (int j = 0; j < 32; ++j) n[j] = kFp4Nibbles.nibble[static_cast<uint8_t>(codes.of[l][j])];
      out[l].e = best[l];
      pack_nibbles(out[l].qs, n);
    }
  }
};

}  // namespace localds::LOCALDS_QUANTIZE
