// How published checkpoints store weights: floats of 8 and 16 bits, scaled or not, and packed
// integers. Everything decodes to float32, one row at a time, with at most one rounding a value.
#pragma once

#include <cstdint>

namespace localds {

enum class SourceFloat { F16, BF16, F8_E4M3, F8_E5M2 };

// Bytes of one value.
int64_t width_of(SourceFloat type);

// `n` values, at any address.
void widen(SourceFloat type, const uint8_t* in, int64_t n, float* out);

// out[c] = in[c] * scales[c / block], for the 8-bit types.
void widen_scaled(SourceFloat type, const uint8_t* in, int64_t n, const float* scales,
                  int64_t block, float* out);

// Integers of 4 or 8 bits in little-endian words, low bits first:
// out[c] = (in[c] - zeros[c / group]) * scales[c / group].
// Without zeros the zero is the middle of the range, 2^(bits - 1).
void unpack(int bits, const uint32_t* in, int64_t n, const float* scales, const uint8_t* zeros,
            int64_t group, float* out);

}  // namespace localds
