// The values that a type's integers stand for before scaling, and the nearest of them.
//
// kFirst and kLast are the ends of the range.
#pragma once

#include "quantize/lanes.h"

namespace localds::LOCALDS_QUANTIZE {

// The integers from kLow to kHigh.
template <int kLow, int kHigh>
struct IntegerGrid {
  static constexpr float kFirst = kLow;
  static constexpr float kLast = kHigh;

  LANES_INLINE static Lanes nearest(Lanes a) { return nearest_integer(clamp(a, kFirst, kLast)); }
};

// The sixteen values of IQ4_NL and IQ4_XS.
struct Iq4Grid {
  static constexpr float kFirst = kIq4Values[0];
  static constexpr float kLast = kIq4Values[15];

  LANES_INLINE static Lanes nearest(Lanes a) {
    Lanes value = fill(kFirst);
    for (int i = 1; i < 16; ++i) {
      const float middle = (kIq4Values[i - 1] + kIq4Values[i]) * 0.5f;
      value = select(a > middle, fill(kIq4Values[i]), value);
    }
    return value;
  }
};

// The values of MXFP4, doubled.
struct Fp4Grid {
  static constexpr float kFirst = -12;
  static constexpr float kLast = 12;

  LANES_INLINE static Lanes nearest(Lanes a) {
    const Lanes size = magnitude(a);
    Lanes value = {};
    for (int i = 1; i < 8; ++i) {
      const float middle = (kFp4Doubled[i - 1] + kFp4Doubled[i]) * 0.5f;
      value = select(size > middle, fill(kFp4Doubled[i]), value);
    }
    return select(a < 0.0f, -value, value);
  }
};

// The nibble of a table's value.
struct NibbleTable {
  uint8_t nibble[256];
};
constexpr NibbleTable invert(const int8_t (&values)[16]) {
  NibbleTable table = {};
  for (int i = 15; i >= 0; --i)
    table.nibble[static_cast<uint8_t>(values[i])] = static_cast<uint8_t>(i);
  return table;
}
constexpr NibbleTable kIq4Nibbles = invert(kIq4Values);
constexpr NibbleTable kFp4Nibbles = invert(kFp4Doubled);

}  // namespace localds::LOCALDS_QUANTIZE
