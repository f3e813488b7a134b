// One decoder per quant type: eight groups of 32 unsigned bytes u and float scales, a span of 256
// elements, so that weight = scale * (u - kZero) or, with kMin, scale * u + min.
//
// A decoder has
//   kSpanBytes   bytes of a span (one block of 256 elements or eight of 32)
//   kHalves      whether scales (and mins) go with 16 elements instead of 32
//   kMin         whether there are mins; if not, kZero is the byte that means zero
//   kWide        whether bytes exceed 127: then they are signed where `dot` wants that
//   group(span, g)           the bytes of group g, for a decoder of 256-element blocks g should be
//                            known at compile time
//   scales(span, groups, s, m)  s[0] (first halves), s[1] (second halves, if kHalves), m likewise
// and, where blocks have 32 elements, kBlockBytes: a row may end inside a span, after `groups`.
#pragma once

#include "formats.h"

namespace localds::LOCALDS_ISA {

// Adds 128 to signed bytes where `dot` wants unsigned ones.
constexpr int kWideZero = kWideUnsigned ? 128 : 0;

struct WideTable {
  int8_t values[16];
};
constexpr WideTable shifted_table(const int8_t (&values)[16], int shift) {
  WideTable table = {};
  for (int i = 0; i < 16; ++i) table.values[i] = static_cast<int8_t>(values[i] + shift);
  return table;
}
constexpr WideTable kIq4Table = shifted_table(kIq4Values, kWideZero);
constexpr WideTable kFp4Table = shifted_table(kFp4Doubled, 12);

template <Type type>
struct Decoder;

// The float16 at `stride` bytes in the first `groups` blocks; zero for the others.
template <int stride>
LOCALDS_INLINE Floats gather_scales(const uint8_t* p, int groups) {
  if (groups == 8) return gather_halves<stride>(p);
  alignas(16) uint8_t halves[16] = {};
  for (int g = 0; g < 8 && g < groups; ++g) std::memcpy(halves + 2 * g, p + g * stride, 2);
  return load_half(halves);
}

// What the types with blocks of 32 have in common: a float16 scale first, perhaps a min next.
template <class Block>
struct SmallBlocks {
  static constexpr int kBlockBytes = sizeof(Block);
  static constexpr int kSpanBytes = 8 * sizeof(Block);
  static constexpr bool kHalves = false;
  static constexpr bool kMin = false;
  static constexpr bool kWide = false;
  static constexpr int kZero = 0;

  LOCALDS_INLINE static const Block* block(const uint8_t* span, int g) {
    return reinterpret_cast<const Block*>(span) + g;
  }
  LOCALDS_INLINE static void scales(const uint8_t* span, int groups, Floats* s, Floats*) {
    s[0] = gather_scales<kBlockBytes>(span, groups);
  }
};

template <class Block>
struct SmallBlocksWithMin : SmallBlocks<Block> {
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int groups, Floats* s, Floats* m) {
    s[0] = gather_scales<sizeof(Block)>(span, groups);
    m[0] = gather_scales<sizeof(Block)>(span + sizeof(Half), groups);
  }
};

template <>
struct Decoder<Type::Q4_0> : SmallBlocks<BlockQ4_0> {
  static constexpr int kZero = 8;

  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    return split_nibbles(block(span, g)->qs);
  }
};

template <>
struct Decoder<Type::Q4_1> : SmallBlocksWithMin<BlockQ4_1> {
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    return split_nibbles(block(span, g)->qs);
  }
};

template <>
struct Decoder<Type::Q5_0> : SmallBlocks<BlockQ5_0> {
  static constexpr int kZero = 16;

  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const BlockQ5_0* b = block(span, g);
    return bytes_or(split_nibbles(b->qs), expand_bits(b->qh, 16));
  }
};

template <>
struct Decoder<Type::Q5_1> : SmallBlocksWithMin<BlockQ5_1> {
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const BlockQ5_1* b = block(span, g);
    return bytes_or(split_nibbles(b->qs), expand_bits(b->qh, 16));
  }
};

template <>
struct Decoder<Type::Q8_0> : SmallBlocks<BlockQ8_0> {
  static constexpr bool kWide = true;
  static constexpr int kZero = kWideZero;

  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const Bytes v = load_bytes(block(span, g)->qs);
    return kWideUnsigned ? bytes_xor(v, 128) : v;
  }
};

template <>
struct Decoder<Type::IQ4_NL> : SmallBlocks<BlockIQ4_NL> {
  static constexpr bool kWide = true;
  static constexpr int kZero = kWideZero;

  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    return lookup(kIq4Table.values, split_nibbles(block(span, g)->qs));
  }
};

template <>
struct Decoder<Type::MXFP4> : SmallBlocks<BlockMXFP4> {
  static constexpr int kZero = 12;

  LOCALDS_INLINE static void scales(const uint8_t* span, int groups, Floats* s, Floats*) {
    float values[8] = {};
    for (int g = 0; g < 8 && g < groups; ++g) values[g] = e8m0_half_to_float(block(span, g)->e);
    s[0] = load(values);
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    return lookup(kFp4Table.values, split_nibbles(block(span, g)->qs));
  }
};

LOCALDS_INLINE uint64_t join(uint32_t low, uint32_t high) {
  return low | static_cast<uint64_t>(high) << 32;
}

LOCALDS_INLINE uint32_t word(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

LOCALDS_INLINE Floats half_floats(Half h) { return floats(half_to_float1(h.bytes)); }

// What the types with blocks of 256 have in common.
template <class BlockType>
struct LargeBlock {
  using Block = BlockType;
  static constexpr int kSpanBytes = sizeof(Block);
  static constexpr bool kHalves = false;
  static constexpr bool kMin = false;
  static constexpr bool kWide = false;
  static constexpr int kZero = 0;

  LOCALDS_INLINE static const Block& block(const uint8_t* span) {
    return *reinterpret_cast<const Block*>(span);
  }
};

template <>
struct Decoder<Type::Q2_K> : LargeBlock<BlockQ2_K> {
  static constexpr bool kHalves = true;
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats* s, Floats* m) {
    const Block& b = block(span);
    constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0f;
    const uint64_t low = join(word(b.scales), word(b.scales + 4));
    const uint64_t high = join(word(b.scales + 8), word(b.scales + 12));
    even_odd_floats(low & kNibbles, high & kNibbles, s[0], s[1]);
    even_odd_floats(low >> 4 & kNibbles, high >> 4 & kNibbles, m[0], m[1]);
    const Floats d = half_floats(b.d), dmin = floats(-half_to_float1(b.dmin.bytes));
    for (int h = 0; h < 2; ++h) {
      s[h] = multiply(s[h], d);
      m[h] = multiply(m[h], dmin);
    }
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const Bytes v = load_bytes(block(span).qs + 32 * (g / 4));
    return bytes_and(bytes_shift(v, 2 * (g % 4)), 3);
  }
};

template <>
struct Decoder<Type::Q3_K> : LargeBlock<BlockQ3_K> {
  static constexpr bool kHalves = true;
  static constexpr int kZero = 4;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats* s, Floats*) {
    const Block& b = block(span);
    const uint32_t a0 = word(b.scales), a1 = word(b.scales + 4), top = word(b.scales + 8);
    const auto six_bits = [](uint32_t low, uint32_t high) {
      return (low & 0x0f0f0f0fu) | (high & 0x03030303u) << 4;
    };
    even_odd_floats(join(six_bits(a0, top), six_bits(a1, top >> 2)),
                    join(six_bits(a0 >> 4, top >> 4), six_bits(a1 >> 4, top >> 6)), s[0], s[1]);
    const Floats d = half_floats(b.d);
    for (int h = 0; h < 2; ++h) s[h] = multiply(subtract(s[h], floats(32)), d);
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const Block& b = block(span);
    const Bytes low = bytes_shift(load_bytes(b.qs + 32 * (g / 4)), 2 * (g % 4));
    const Bytes high = bytes_shift(load_bytes(b.hmask), g - 2);
    return bytes_or(bytes_and(low, 3), bytes_and(high, 4));
  }
};

// Eight 6-bit scales and mins of Q4_K and Q5_K.
template <class Block>
LOCALDS_INLINE void six_bit_scales(const Block& b, Floats* s, Floats* m) {
  const uint32_t a0 = word(b.scales), a1 = word(b.scales + 4), a2 = word(b.scales + 8);
  constexpr uint32_t kSix = 0x3f3f3f3fu, kFour = 0x0f0f0f0fu, kTop = 0x30303030u;
  const uint64_t scales = join(a0 & kSix, (a2 & kFour) | (a0 >> 2 & kTop));
  const uint64_t mins = join(a1 & kSix, (a2 >> 4 & kFour) | (a1 >> 2 & kTop));
  s[0] = multiply(uint8_to_floats(scales), half_floats(b.d));
  m[0] = multiply(uint8_to_floats(mins), floats(-half_to_float1(b.dmin.bytes)));
}

template <>
struct Decoder<Type::Q4_K> : LargeBlock<BlockQ4_K> {
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats* s, Floats* m) {
    six_bit_scales(block(span), s, m);
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const Bytes v = load_bytes(block(span).qs + 32 * (g / 2));
    return bytes_and(bytes_shift(v, 4 * (g % 2)), 15);
  }
};

template <>
struct Decoder<Type::Q5_K> : LargeBlock<BlockQ5_K> {
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats* s, Floats* m) {
    six_bit_scales(block(span), s, m);
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const Block& b = block(span);
    const Bytes low = bytes_shift(load_bytes(b.qs + 32 * (g / 2)), 4 * (g % 2));
    const Bytes high = bytes_shift(load_bytes(b.qh), g - 4);
    return bytes_or(bytes_and(low, 15), bytes_and(high, 16));
  }
};

template <>
struct Decoder<Type::Q6_K> : LargeBlock<BlockQ6_K> {
  static constexpr bool kHalves = true;
  static constexpr int kZero = 32;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats* s, Floats*) {
    const Block& b = block(span);
    const auto* p = reinterpret_cast<const uint8_t*>(b.scales);
    constexpr uint64_t kSigns = 0x8080808080808080;
    even_odd_floats(join(word(p), word(p + 4)) ^ kSigns, join(word(p + 8), word(p + 12)) ^ kSigns,
                    s[0], s[1]);
    const Floats d = half_floats(b.d);
    for (int h = 0; h < 2; ++h) s[h] = multiply(subtract(s[h], floats(128)), d);
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    const Block& b = block(span);
    const int half = g / 4, quarter = g % 4;
    const Bytes low = load_bytes(b.ql + 64 * half + 32 * (quarter % 2));
    const Bytes high = bytes_shift(load_bytes(b.qh + 32 * half), 2 * quarter - 4);
    return bytes_or(bytes_and(bytes_shift(low, quarter < 2 ? 0 : 4), 15), bytes_and(high, 48));
  }
};

template <>
struct Decoder<Type::IQ4_XS> : LargeBlock<BlockIQ4_XS> {
  static constexpr bool kWide = true;
  static constexpr int kZero = kWideZero;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats* s, Floats*) {
    const Block& b = block(span);
    const uint32_t top = static_cast<uint32_t>(b.scales_h[0] | b.scales_h[1] << 8);
    const Floats low = to_floats(unpack_fields<4, 4>(word(b.scales_l)));
    const Floats high = to_floats(unpack_fields<2, 2>(top));
    const Floats scale = subtract(fma(high, floats(16), low), floats(32));
    s[0] = multiply(scale, half_floats(b.d));
  }
  LOCALDS_INLINE static Bytes group(const uint8_t* span, int g) {
    return lookup(kIq4Table.values, split_nibbles(block(span).qs + 16 * g));
  }
};

}  // namespace localds::LOCALDS_ISA
