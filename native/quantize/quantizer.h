// Whole rows of every type, for one instruction set (LOCALDS_QUANTIZE names the namespace).
#pragma once

#include <algorithm>
#include <cmath>

#include "quantize/quantize.h"
#include "quantize/small_blocks.h"
#include "quantize/super_blocks.h"

namespace localds::LOCALDS_QUANTIZE {

// Below this a block's weights are as good as zero: no float16 scale reaches them.
constexpr float kTiny = 1e-30f;

// Quantizes `elements` consecutive weights: whole rows of `cols`, that `importance` goes with.
// A unit is the largest weight of a block of kUnit; weights are divided by it, so that no square
// of one overflows.
template <class Writer, class Block, int kSize, int kUnit>
void quantize_blocks(const float* x, int64_t elements, int64_t cols, const float* importance,
                     uint8_t* out) {
  constexpr int kPerBatch = kSize * kLanes;
  auto* blocks = reinterpret_cast<Block*>(out);
  Groups<kSize> groups;
  for (int64_t start = 0; start < elements; start += kPerBatch) {
    const int count = static_cast<int>(std::min<int64_t>(elements - start, kPerBatch) / kSize);
    Lanes unit = fill(1.0f);
    for (int first = 0; first < count * kSize; first += kUnit) {
      float largest = 0;
      for (int j = 0; j < kUnit; ++j) largest = std::max(largest, std::abs(x[start + first + j]));
      for (int l = first / kSize; l < (first + kUnit) / kSize; ++l) {
        unit[l] = largest < kTiny ? 0.0f : largest;
      }
    }
    const Lanes inverse = ratio(fill(1.0f), unit);
    for (int l = 0; l < kLanes; ++l) {
      const int64_t at = start + static_cast<int64_t>(l < count ? l : 0) * kSize;
      const float *values = x + at, *weights = importance + at % cols;
      const float factor = inverse[l];
      for (int j = 0; j < kSize; ++j) {
        groups.x[j][l] = values[j] * factor;
        groups.w[j][l] = weights[j];
      }
    }
    Writer::write(groups, unit, count, blocks);
    blocks += count * kSize / kUnit;
  }
}

// Q8_0 as every writer of GGUF files makes it, to the bit: no scale but the largest weight's.
inline void quantize_q8_0(const float* x, int64_t elements, uint8_t* out) {
  auto* block = reinterpret_cast<BlockQ8_0*>(out);
  for (int64_t start = 0; start < elements; start += 32, ++block) {
    Lanes halves[2];
    std::memcpy(halves, x + start, sizeof halves);
    const Lanes sizes = larger(magnitude(halves[0]), magnitude(halves[1]));
    float largest = 0;
    for (int l = 0; l < kLanes; ++l) largest = std::max(largest, sizes[l]);
    const float d = largest / 127.0f, inverse = d != 0 ? 1.0f / d : 0.0f;
    block->d = to_half(d);
    for (int h = 0; h < 2; ++h) {
      // Ties away from zero.
      const Lanes scaled = halves[h] * inverse, size = magnitude(scaled);
      const Mask whole = __builtin_convertvector(size, Mask);
      const Mask up = size - __builtin_convertvector(whole, Lanes) >= 0.5f;
      const Mask rounded = whole - up;
      const Mask q = scaled < 0.0f ? -rounded : rounded;
      for (int l = 0; l < kLanes; ++l) block->qs[16 * h + l] = static_cast<int8_t>(q[l]);
    }
  }
}

// The upper halves of float32, rounded to nearest even.
inline void convert_bf16(const float* x, int64_t elements, uint8_t* out) {
  for (int64_t i = 0; i < elements; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const auto upper = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    std::memcpy(out + 2 * i, &upper, 2);
  }
}

// Beyond the largest float16 lies infinity, as IEEE 754 has it.
inline void convert_f16(const float* x, int64_t elements, uint8_t* out) {
  for (int64_t i = 0; i < elements; ++i) {
    const uint16_t half = float_to_half(x[i]);
    std::memcpy(out + 2 * i, &half, 2);
  }
}

inline void quantize_rows(Type type, const float* x, int64_t rows, int64_t cols,
                          const float* importance, uint8_t* out) {
  const int64_t n = rows * cols;
  switch (type) {
    case Type::F32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      return;
    case Type::F16:
      return convert_f16(x, n, out);
    case Type::BF16:
      return convert_bf16(x, n, out);
    case Type::Q8_0:
      return quantize_q8_0(x, n, out);
    case Type::Q4_0:
      return quantize_blocks<SmallSymmetric<BlockQ4_0, 8>, BlockQ4_0, 32, 32>(x, n, cols,
                                                                              importance, out);
    case Type::Q4_1:
      return quantize_blocks<SmallAffine<BlockQ4_1, 15>, BlockQ4_1, 32, 32>(x, n, cols, importance,
                                                                            out);
    case Type::Q5_0:
      return quantize_blocks<SmallSymmetric<BlockQ5_0, 16>, BlockQ5_0, 32, 32>(x, n, cols,
                                                                               importance, out);
    case Type::Q5_1:
      return quantize_blocks<SmallAffine<BlockQ5_1, 31>, BlockQ5_1, 32, 32>(x, n, cols, importance,
                                                                            out);
    case Type::IQ4_NL:
      return quantize_blocks<SmallIq4, BlockIQ4_NL, 32, 32>(x, n, cols, importance, out);
    case Type::MXFP4:
      return quantize_blocks<SmallFp4, BlockMXFP4, 32, 32>(x, n, cols, importance, out);
    case Type::Q2_K:
      return quantize_blocks<SuperQ2_K, BlockQ2_K, 16, 256>(x, n, cols, importance, out);
    case Type::Q3_K:
      return quantize_blocks<SuperQ3_K, BlockQ3_K, 16, 256>(x, n, cols, importance, out);
    case Type::Q4_K:
      return quantize_blocks<SuperWithMins<BlockQ4_K, 15>, BlockQ4_K, 32, 256>(x, n, cols,
                                                                               importance, out);
    case Type::Q5_K:
      return quantize_blocks<SuperWithMins<BlockQ5_K, 31>, BlockQ5_K, 32, 256>(x, n, cols,
                                                                               importance, out);
    case Type::Q6_K:
      return quantize_blocks<SuperQ6_K, BlockQ6_K, 16, 256>(x, n, cols, importance, out);
    case Type::IQ4_XS:
      return quantize_blocks<SuperIQ4_XS, BlockIQ4_XS, 32, 256>(x, n, cols, importance, out);
  }
}

}  // namespace localds::LOCALDS_QUANTIZE
