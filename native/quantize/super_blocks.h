// Types with blocks of 256 weights: groups of 16 or 32 whose scales (and mins) are small integers
// times one float16 scale (and one for the mins) of the block.
//
// Given the groups' own scales, the block's scale is fitted, the groups' integers are searched
// around what it makes of them, and the block's scale is solved again for what was found.
#pragma once

#include "quantize/fit.h"

namespace localds::LOCALDS_QUANTIZE {

// How often the block's scale is solved again.
constexpr int kRefits = 2;

// A solution for 16 groups. `scale` is the float16 scale, the same in all lanes of a block.
struct Scaled {
  Lanes scale;  // as stored, in the groups' units
  Lanes steps;  // the groups' integer scales
  Lanes error;  // sum over the block
};

template <class Grid, int kSize, int kLow, int kHigh>
struct ScaledBlock {
  static constexpr int kGroups = 256 / kSize;
  using Input = Groups<kSize>;

  // The best integer scales under `scale`, next to those that the groups ask for.
  LANES_INLINE static Scaled settle(const Input& groups, Lanes scale, Lanes wanted) {
    const Lanes middle = nearest_integer(clamp(ratio(wanted, scale), kLow, kHigh));
    Scaled best = {scale, middle, fill(INFINITY)};
    for (int change = -1; change <= 1; ++change) {
      const Lanes steps = clamp(middle + static_cast<float>(change), kLow, kHigh);
      const Lanes factor = scale * steps, inverse = ratio(fill(1.0f), factor);
      Lanes error = {};
      for (int j = 0; j < kSize; ++j) {
        const Lanes left = groups.x[j] - factor * Grid::nearest(groups.x[j] * inverse);
        error += groups.w[j] * left * left;
      }
      const Mask better = error < best.error;
      best.steps = select(better, steps, best.steps);
      best.error = select(better, error, best.error);
    }
    best.error = block_sums<kGroups>(best.error);
    return best;
  }

  // The block's scale that is best for the integers of a solution.
  LANES_INLINE static Lanes refit(const Input& groups, const Scaled& found) {
    const Lanes inverse = ratio(fill(1.0f), found.scale * found.steps);
    Lanes xv = {}, vv = {};
    for (int j = 0; j < kSize; ++j) {
      const Lanes value = found.steps * Grid::nearest(groups.x[j] * inverse);
      xv += groups.w[j] * value * groups.x[j];
      vv += groups.w[j] * value * value;
    }
    return ratio(block_sums<kGroups>(xv), block_sums<kGroups>(vv));
  }

  LANES_INLINE static Scaled solve(const Input& groups, Lanes unit) {
    const Lanes wanted = fit_scale<Grid>(groups);
    Lanes extreme = {};
    for (int block = 0; block < kLanes; block += kGroups) {
      float top = 0;
      for (int l = block; l < block + kGroups; ++l) {
        if (std::abs(wanted[l]) > std::abs(top)) top = wanted[l];
      }
      for (int l = block; l < block + kGroups; ++l) extreme[l] = top;
    }
    const auto stored = [&](Lanes scale) { return ratio(through_half(scale * unit), unit); };
    Scaled best = settle(groups, stored(extreme * (1.0f / kLow)), wanted);
    const auto consider = [&](Lanes scale) LANES_LAMBDA {
      const Scaled other = settle(groups, stored(scale), wanted);
      const Mask better = other.error < best.error;
      best.scale = select(better, other.scale, best.scale);
      best.steps = select(better, other.steps, best.steps);
      best.error = select(better, other.error, best.error);
    };
    consider(extreme * (1.0f / kHigh));
    for (int i = 0; i < kRefits; ++i) consider(refit(groups, best));
    return best;
  }

  LANES_INLINE static void encode(const Input& groups, const Scaled& found, Codes<kSize>& codes,
                                  float zero) {
    const Lanes inverse = ratio(fill(1.0f), found.scale * found.steps);
    for (int j = 0; j < kSize; ++j) {
      codes.store(j, Grid::nearest(groups.x[j] * inverse) + zero);
    }
  }
};

struct SuperQ6_K {
  using Solver = ScaledBlock<IntegerGrid<-32, 31>, 16, -128, 127>;
  static void write(const Groups<16>& groups, Lanes unit, int, BlockQ6_K* out) {
    const Scaled found = Solver::solve(groups, unit);
    Codes<16> codes;
    Solver::encode(groups, found, codes, 32);
    out->d = to_half(found.scale[0] * unit[0]);
    for (int l = 0; l < 16; ++l) out->scales[l] = static_cast<int8_t>(found.steps[l]);
    const int8_t* q = codes.of[0];
    for (int half = 0; half < 2; ++half, q += 128) {
      for (int l = 0; l < 32; ++l) {
        uint8_t *ql = out->ql + 64 * half + l, *qh = out->qh + 32 * half + l;
        ql[0] = static_cast<uint8_t>((q[l] & 15) | (q[l + 64] & 15) << 4);
        ql[32] = static_cast<uint8_t>((q[l + 32] & 15) | (q[l + 96] & 15) << 4);
        *qh = static_cast<uint8_t>(q[l] >> 4 | (q[l + 32] >> 4) << 2 | (q[l + 64] >> 4) << 4 |
                                   (q[l + 96] >> 4) << 6);
      }
    }
  }
};

struct SuperQ3_K {
  using Solver = ScaledBlock<IntegerGrid<-4, 3>, 16, -32, 31>;
  static void write(const Groups<16>& groups, Lanes unit, int, BlockQ3_K* out) {
    const Scaled found = Solver::solve(groups, unit);
    Codes<16> codes;
    Solver::encode(groups, found, codes, 4);
    *out = {};
    out->d = to_half(found.scale[0] * unit[0]);
    for (int k = 0; k < 16; ++k) {
      const int scale = static_cast<int>(found.steps[k]) + 32;
      out->scales[k % 8] |= static_cast<uint8_t>((scale & 15) << (k < 8 ? 0 : 4));
      out->scales[8 + k % 4] |= static_cast<uint8_t>(scale >> 4 << (2 * (k / 4)));
    }
    const int8_t* q = codes.of[0];
    for (int half = 0; half < 2; ++half) {
      for (int j = 0; j < 4; ++j) {
        for (int l = 0; l < 32; ++l, ++q) {
          out->qs[32 * half + l] |= static_cast<uint8_t>((*q & 3) << (2 * j));
          out->hmask[l] |= static_cast<uint8_t>(*q >> 2 << (4 * half + j));
        }
      }
    }
  }
};

struct SuperIQ4_XS {
  using Solver = ScaledBlock<Iq4Grid, 32, -32, 31>;
  static void write(const Groups<32>& groups, Lanes unit, int count, BlockIQ4_XS* out) {
    const Scaled found = Solver::solve(groups, unit);
    Codes<32> codes;
    Solver::encode(groups, found, codes, 0);
    for (int l = 0; l < count; ++l) {
      BlockIQ4_XS& block = out[l / 8];
      const int b = l % 8, scale = static_cast<int>(found.steps[l]) + 32;
      if (b == 0) {
        block = {};
        block.d = to_half(found.scale[l] * unit[l]);
      }
      block.scales_l[b / 2] |= static_cast<uint8_t>((scale & 15) << (4 * (b % 2)));
      block.scales_h[b / 4] |= static_cast<uint8_t>(scale >> 4 << (2 * (b % 4)));
      for (int j = 0; j < 16; ++j) {
        const auto nibble = [&](int at) {
          return kIq4Nibbles.nibble[static_cast<uint8_t>(codes.of[l][at])];
        };
        block.qs[16 * b + j] = static_cast<uint8_t>(nibble(j) | nibble(j + 16) << 4);
      }
    }
  }
};

// A solution with mins: x ~ scale * steps * q - min_scale * min_steps.
struct ScaledWithMins {
  Lanes scale, min_scale;  // as stored, in the groups' units
  Lanes steps, min_steps;
  Lanes error;
};

template <int kTop, int kSize, int kMost>
struct AffineBlock {
  static constexpr int kGroups = 256 / kSize;
  using Input = Groups<kSize>;

  LANES_INLINE static Lanes quantize(Lanes x, Lanes min, Lanes inverse) {
    return nearest_integer(clamp((x + min) * inverse, 0, kTop));
  }

  LANES_INLINE static ScaledWithMins settle(const Input& groups, Lanes scale, Lanes min_scale,
                                            const Affine& wanted) {
    const Lanes middle = nearest_integer(clamp(ratio(wanted.scale, scale), 0, kMost));
    const Lanes min_middle = nearest_integer(clamp(ratio(-wanted.offset, min_scale), 0, kMost));
    ScaledWithMins best = {scale, min_scale, middle, min_middle, fill(INFINITY)};
    for (int change = -1; change <= 1; ++change) {
      const Lanes steps = clamp(middle + static_cast<float>(change), 0, kMost);
      const Lanes factor = scale * steps, inverse = ratio(fill(1.0f), factor);
      for (int min_change = -1; min_change <= 1; ++min_change) {
        const Lanes min_steps = clamp(min_middle + static_cast<float>(min_change), 0, kMost);
        const Lanes min = min_scale * min_steps;
        Lanes error = {};
        for (int j = 0; j < kSize; ++j) {
          const Lanes left = groups.x[j] + min - factor * quantize(groups.x[j], min, inverse);
          error += groups.w[j] * left * left;
        }
        const Mask better = error < best.error;
        best.steps = select(better, steps, best.steps);
        best.min_steps = select(better, min_steps, best.min_steps);
        best.error = select(better, error, best.error);
      }
    }
    best.error = block_sums<kGroups>(best.error);
    return best;
  }

  // The block's two scales that are best for the integers of a solution: two normal equations.
  LANES_INLINE static void refit(const Input& groups, const ScaledWithMins& found, Lanes& scale,
                                 Lanes& min_scale) {
    const Lanes inverse = ratio(fill(1.0f), found.scale * found.steps);
    const Lanes min = found.min_scale * found.min_steps;
    Lanes vv = {}, vm = {}, mm = {}, xv = {}, xm = {};
    for (int j = 0; j < kSize; ++j) {
      const Lanes value = found.steps * quantize(groups.x[j], min, inverse);
      const Lanes weighted = groups.w[j] * value, weighted_min = groups.w[j] * found.min_steps;
      vv += weighted * value;
      vm += weighted * found.min_steps;
      mm += weighted_min * found.min_steps;
      xv += weighted * groups.x[j];
      xm += weighted_min * groups.x[j];
    }
    vv = block_sums<kGroups>(vv);
    vm = block_sums<kGroups>(vm);
    mm = block_sums<kGroups>(mm);
    xv = block_sums<kGroups>(xv);
    xm = block_sums<kGroups>(xm);
    const Lanes determinant = vv * mm - vm * vm;
    min_scale = ratio(vm * xv - vv * xm, determinant);
    const Mask without = (determinant <= 1e-6f * vv * mm) | (min_scale < 0.0f);
    min_scale = select(without, Lanes{}, min_scale);
    scale = larger(select(without, ratio(xv, vv), ratio(mm * xv - vm * xm, determinant)), Lanes{});
  }

  LANES_INLINE static ScaledWithMins solve(const Input& groups, Lanes unit) {
    const Affine wanted = fit_affine<kTop, true>(groups);
    Lanes top = wanted.scale, deepest = -wanted.offset;
    for (int block = 0; block < kLanes; block += kGroups) {
      float scale = 0, min = 0;
      for (int l = block; l < block + kGroups; ++l) {
        scale = top[l] > scale ? top[l] : scale;
        min = deepest[l] > min ? deepest[l] : min;
      }
      for (int l = block; l < block + kGroups; ++l) {
        top[l] = scale;
        deepest[l] = min;
      }
    }
    const auto stored = [&](Lanes scale) { return ratio(through_half(scale * unit), unit); };
    Lanes scale = top * (1.0f / kMost), min_scale = deepest * (1.0f / kMost);
    ScaledWithMins best = settle(groups, stored(scale), stored(min_scale), wanted);
    for (int i = 0; i < kRefits; ++i) {
      refit(groups, best, scale, min_scale);
      const ScaledWithMins other = settle(groups, stored(scale), stored(min_scale), wanted);
      const Mask better = other.error < best.error;
      best.scale = select(better, other.scale, best.scale);
      best.min_scale = select(better, other.min_scale, best.min_scale);
      best.steps = select(better, other.steps, best.steps);
      best.min_steps = select(better, other.min_steps, best.min_steps);
      best.error = select(better, other.error, best.error);
    }
    return best;
  }

  LANES_INLINE static void encode(const Input& groups, const ScaledWithMins& found,
                                  Codes<kSize>& codes) {
    const Lanes inverse = ratio(fill(1.0f), found.scale * found.steps);
    const Lanes min = found.min_scale * found.min_steps;
    for (int j = 0; j < kSize; ++j) codes.store(j, quantize(groups.x[j], min, inverse));
  }
};

struct SuperQ2_K {
  using Solver = AffineBlock<3, 16, 15>;
  static void write(const Groups<16>& groups, Lanes unit, int, BlockQ2_K* out) {
    const ScaledWithMins found = Solver::solve(groups, unit);
    Codes<16> codes;
    Solver::encode(groups, found, codes);
    *out = {};
    out->d = to_half(found.scale[0] * unit[0]);
    out->dmin = to_half(found.min_scale[0] * unit[0]);
    for (int l = 0; l < 16; ++l) {
      out->scales[l] = static_cast<uint8_t>(static_cast<int>(found.steps[l]) |
                                            static_cast<int>(found.min_steps[l]) << 4);
    }
    const int8_t* q = codes.of[0];
    for (int half = 0; half < 2; ++half) {
      for (int j = 0; j < 4; ++j) {
        for (int l = 0; l < 32; ++l, ++q) {
          out->qs[32 * half + l] |= static_cast<uint8_t>(*q << (2 * j));
        }
      }
    }
  }
};

// The 6-bit scales and mins of Q4_K and Q5_K: the first four whole, the others split.
LANES_INLINE void pack_scale(uint8_t (&scales)[12], int b, int scale, int min) {
  if (b < 4) {
    scales[b] |= static_cast<uint8_t>(scale);
    scales[b + 4] |= static_cast<uint8_t>(min);
    return;
  }
  scales[b + 4] = static_cast<uint8_t>((scale & 15) | (min & 15) << 4);
  scales[b - 4] |= static_cast<uint8_t>(scale >> 4 << 6);
  scales[b] |= static_cast<uint8_t>(min >> 4 << 6);
}

template <class Block, int kTop>
struct SuperWithMins {  // Q4_K, Q5_K
  using Solver = AffineBlock<kTop, 32, 63>;
  static void write(const Groups<32>& groups, Lanes unit, int count, Block* out) {
    const ScaledWithMins found = Solver::solve(groups, unit);
    Codes<32> codes;
    Solver::encode(groups, found, codes);
    for (int l = 0; l < count; ++l) {
      Block& block = out[l / 8];
      const int b = l % 8;
      if (b == 0) {
        block = {};
        block.d = to_half(found.scale[l] * unit[l]);
        block.dmin = to_half(found.min_scale[l] * unit[l]);
      }
      pack_scale(block.scales, b, static_cast<int>(found.steps[l]),
                 static_cast<int>(found.min_steps[l]));
      const int8_t* q = codes.of[l];
      for (int j = 0; j < 32; ++j) {
        block.qs[32 * (b / 2) + j] |= static_cast<uint8_t>((q[j] & 15) << (4 * (b % 2)));
        if constexpr (kTop == 31) block.qh[j] |= static_cast<uint8_t>(q[j] >> 4 << b);
      }
    }
  }
};

}  // namespace localds::LOCALDS_QUANTIZE
