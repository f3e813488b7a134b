// The scales that groups of weights ask for: least weighted squared error, by search.
//
// Rounding makes the error a function with many valleys. A search tries scales around the one that
// maps the largest weight to the end of the grid; given its integers, the best scale (and min) of
// each try follows by least squares, and the winner is rounded and solved again.
#pragma once

#include "quantize/grids.h"

namespace localds::LOCALDS_QUANTIZE {

// Where the weight of largest magnitude may land, in units of the grid's end: beyond 1 it is cut.
constexpr float kLandings[] = {0.78f,  0.84f, 0.87f, 0.9f,  0.925f, 0.95f, 0.97f, 0.985f, 1.0f,
                               1.015f, 1.03f, 1.05f, 1.07f, 1.1f,   1.13f, 1.17f, 1.25f,  1.4f};
constexpr float kOtherLandings[] = {0.9f, 0.97f, 1.0f, 1.03f, 1.08f};

// Scales s of the groups with x ~ s * value.
template <class Grid, int kSize>
LANES_INLINE Lanes fit_scale(const Groups<kSize>& groups) {
  Lanes extreme = {};
  for (int j = 0; j < kSize; ++j) {
    extreme = select(magnitude(groups.x[j]) > magnitude(extreme), groups.x[j], extreme);
  }
  Lanes best = {}, best_gain = {};
  const auto attempt = [&](Lanes inverse) LANES_LAMBDA {
    Lanes xv = {}, vv = {};
    for (int j = 0; j < kSize; ++j) {
      const Lanes value = Grid::nearest(groups.x[j] * inverse);
      const Lanes weighted = groups.w[j] * value;
      xv += weighted * groups.x[j];
      vv += weighted * value;
    }
    const Lanes scale = ratio(xv, vv), gain = scale * xv;
    const Mask better = gain > best_gain;
    best = select(better, scale, best);
    best_gain = select(better, gain, best_gain);
  };
  const Lanes unit = ratio(fill(1.0f), extreme);
  for (float landing : kLandings) attempt(unit * (landing * Grid::kFirst));
  for (float landing : kOtherLandings) attempt(unit * (landing * Grid::kLast));
  for (int i = 0; i < 2; ++i) attempt(ratio(fill(1.0f), best));
  return best;
}

struct Affine {
  Lanes scale, offset;  // x ~ scale * q + offset
};

// Scales (not negative) and offsets of the groups with q in [0, kTop].
// With kNegative, offsets are at most 0.
template <int kTop, bool kNegative, int kSize>
LANES_INLINE Affine fit_affine(const Groups<kSize>& groups) {
  Lanes low = groups.x[0], high = groups.x[0], weights = {}, wx = {};
  for (int j = 0; j < kSize; ++j) {
    low = smaller(low, groups.x[j]);
    high = larger(high, groups.x[j]);
    weights += groups.w[j];
    wx += groups.w[j] * groups.x[j];
  }
  if (kNegative) low = smaller(low, Lanes{});
  const Lanes mean = kNegative ? smaller(ratio(wx, weights), Lanes{}) : ratio(wx, weights);
  // Until an attempt gains more: all weights at their mean.
  Affine best = {Lanes{}, mean};
  Lanes best_gain = mean * (2.0f * wx - mean * weights);
  const auto attempt = [&](Lanes inverse, Lanes origin) LANES_LAMBDA {
    Lanes wq = {}, wqq = {}, wxq = {};
    for (int j = 0; j < kSize; ++j) {
      const Lanes q = nearest_integer(clamp((groups.x[j] - origin) * inverse, 0, kTop));
      const Lanes weighted = groups.w[j] * q;
      wq += weighted;
      wqq += weighted * q;
      wxq += weighted * groups.x[j];
    }
    const Lanes determinant = weights * wqq - wq * wq;
    Lanes scale = ratio(weights * wxq - wx * wq, determinant);
    Lanes offset = ratio(wx * wqq - wq * wxq, determinant);
    Mask without = determinant <= 1e-6f * weights * wqq;
    if (kNegative) without |= offset > 0.0f;
    scale = larger(select(without, ratio(wxq, wqq), scale), Lanes{});
    offset = select(without, Lanes{}, offset);
    const Lanes gain = scale * (2.0f * wxq - scale * wqq) +
                       offset * (2.0f * wx - offset * weights) - 2.0f * scale * offset * wq;
    const Mask better = gain > best_gain;
    best.scale = select(better, scale, best.scale);
    best.offset = select(better, offset, best.offset);
    best_gain = select(better, gain, best_gain);
  };
  // Coarse grids gain from other origins than the smallest weight, fine ones hardly.
  constexpr int kOrigins = kTop <= 3 ? 4 : 2;
  constexpr int kSteps = kTop <= 3 ? 12 : 10;
  const Lanes range = high - low;
  for (int o = 0; o < kOrigins; ++o) {
    const Lanes origin = low + range * (0.06f * o);
    for (int i = 0; i < kSteps; ++i) {
      const float span = kTop <= 3 ? kTop * (0.85f + 0.08f * i) : kTop - 0.6f + 0.25f * i;
      attempt(ratio(fill(span), range), origin);
    }
  }
  for (int i = 0; i < 3; ++i) attempt(ratio(fill(1.0f), best.scale), best.offset);
  return best;
}

}  // namespace localds::LOCALDS_QUANTIZE
