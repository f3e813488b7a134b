// Sixteen groups of weights side by side: lane l of every vector belongs to group l.
//
// All arithmetic of the quantizers is element by element over these lanes, in one order, and their
// files are compiled without fused multiply-adds: so every instruction set finds the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"

#define LANES_INLINE inline __attribute__((always_inline))
#define LANES_LAMBDA __attribute__((always_inline))

namespace localds::LOCALDS_QUANTIZE {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

LANES_INLINE Lanes fill(float value) { return Lanes{} + value; }
LANES_INLINE Lanes select(Mask mask, Lanes yes, Lanes no) { return mask ? yes : no; }
LANES_INLINE Lanes smaller(Lanes a, Lanes b) { return select(a < b, a, b); }
LANES_INLINE Lanes larger(Lanes a, Lanes b) { return select(a > b, a, b); }
LANES_INLINE Lanes magnitude(Lanes a) { return larger(a, -a); }
LANES_INLINE Lanes clamp(Lanes a, float low, float high) {
  return smaller(larger(a, fill(low)), fill(high));
}

// The nearest integers, ties to even: the sum with 1.5 * 2^23 has no bits for fractions. |a| <
// 2^22.
LANES_INLINE Lanes nearest_integer(Lanes a) { return (a + 12582912.0f) - 12582912.0f; }

// a / b, and 0 where b is 0.
LANES_INLINE Lanes ratio(Lanes a, Lanes b) {
  const Mask zero = b == 0.0f;
  return select(zero, Lanes{}, a / select(zero, fill(1.0f), b));
}

// Groups of kSize weights and their importance; element j of group l is x[j][l].
template <int kSize>
struct Groups {
  Lanes x[kSize];
  Lanes w[kSize];
};

// The integers of the groups' weights, a group after the other.
template <int kSize>
struct Codes {
  int8_t of[kLanes][kSize];

  LANES_INLINE void store(int j, Lanes values) {
    const Mask integers = __builtin_convertvector(values, Mask);
    for (int l = 0; l < kLanes; ++l) of[l][j] = static_cast<int8_t>(integers[l]);
  }
};

// Sums over the lanes of each block of kGroups groups, in all of its lanes.
template <int kGroups>
LANES_INLINE Lanes block_sums(Lanes a) {
  for (int block = 0; block < kLanes; block += kGroups) {
    float sum = 0;
    for (int l = 0; l < kGroups; ++l) sum += a[block + l];
    for (int l = 0; l < kGroups; ++l) a[block + l] = sum;
  }
  return a;
}

// What a float16 scale keeps of `value`; too large ones become the largest.
LANES_INLINE Half to_half(float value) {
  constexpr float kLargest = 65504.0f;
  const float finite = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  const uint16_t bits = float_to_half(finite);
  return {{static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8)}};
}
LANES_INLINE Lanes through_half(Lanes a) {
  for (int l = 0; l < kLanes; ++l) a[l] = to_float(to_half(a[l]));
  return a;
}

}  // namespace localds::LOCALDS_QUANTIZE
