// The block layouts of the GGUF types that the kernels read, and conversions to and from float16.
//
// All fields are bytes, so a block may lie at any address. `n` below is a nibble; a "16-split" byte
// j holds element j in its low nibble and element j + 16 in its high nibble.
#pragma once

#include <bit>
#include <cstdint>

#include "matrix.h"

namespace localds {

struct Half {
  uint8_t bytes[2];
};

struct BlockQ4_0 {  // d * (n - 8)
  Half d;
  uint8_t qs[16];
};
struct BlockQ4_1 {  // d * n + m
  Half d, m;
  uint8_t qs[16];
};
struct BlockQ5_0 {  // d * (n + 16 * high bit - 16)
  Half d;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ5_1 {  // d * (n + 16 * high bit) + m
  Half d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ8_0 {  // d * q
  Half d;
  int8_t qs[32];
};
struct BlockIQ4_NL {  // d * kIq4Values[n]
  Half d;
  uint8_t qs[16];
};
struct BlockMXFP4 {  // 2^(e - 128) * kFp4Doubled[n]
  uint8_t e;
  uint8_t qs[16];
};
struct BlockQ2_K {  // d * low(scale) * q - dmin * high(scale), a scale per 16
  uint8_t scales[16];
  uint8_t qs[64];
  Half d, dmin;
};
struct BlockQ3_K {  // d * (scale - 32) * (q - 4 unless the mask bit is set), a scale per 16
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  Half d;
};
struct BlockQ4_K {  // d * scale * n - dmin * min, a scale and a min per 32
  Half d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
struct BlockQ5_K {  // as Q4_K with n + 16 * high bit
  Half d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
struct BlockQ6_K {  // d * scale * (q - 32), a scale per 16
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  Half d;
};
struct BlockIQ4_XS {  // d * (scale - 32) * kIq4Values[n], a scale per 32
  Half d;
  uint8_t scales_h[2];
  uint8_t scales_l[4];
  uint8_t qs[128];
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockIQ4_NL) == 18 && sizeof(BlockMXFP4) == 17);
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210 && sizeof(BlockIQ4_XS) == 136);
static_assert(alignof(BlockQ4_K) == 1 && alignof(BlockMXFP4) == 1);

inline constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr int8_t kFp4Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The conversions are `static`: an external inline function compiled for AVX-512 could be the copy
// that the linker keeps for everybody.

static inline uint32_t load_u32(const uint8_t* p) {
  return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // Shifting puts the exponent 112 too low; the product is exact and makes subnormals normal.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

static inline float to_float(Half h) {
  return half_to_float(static_cast<uint16_t>(h.bytes[0] | h.bytes[1] << 8));
}

// Rounds to nearest, ties to even; overflow gives infinity.
static inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the unit 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float bf16_to_float(uint16_t b) {
  return std::bit_cast<float>(static_cast<uint32_t>(b) << 16);
}

// 2^(e - 128), the scale of an MXFP4 block whose values are doubled.
static inline float e8m0_half_to_float(uint8_t e) {
  return std::bit_cast<float>(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

}  // namespace localds
