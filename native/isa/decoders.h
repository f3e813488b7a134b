// One decoder per quant type: eight groups of 32 unsigned bytes u and float scales, a span of 256
// elements, so that weight = scale * (u - kZero) or, with kMin, scale * u + min.
//
// A decoder has
//   kSpanBytes   bytes of a span (one block of 256 elements or eight of 32)
//   kHalves      whether scales (and mins) go with 16 elements instead of 32
//   kMin         whether there are mins; if not, kZero is the byte that means zero
//   kWide        whether bytes exceed 63: then they are signed where `dot` wants that
//   quads(span, part, groups, first, second)   128 of the bytes; `part` is 0 or 1
//   scales(span, groups, s, m)   scale (and min) of each group; with kHalves
//   scales(span, s, m, d, dmin)  integers for the 16 halves: scale = d * s, min = dmin * m
// and, where blocks have 32 elements, kBlockBytes: a row may end inside a span, after `groups`.
//
// The bytes come in chunks of 16, half a group each. With kHalves they are in order. Otherwise part
// p has the first halves of groups p, p + 2, p + 4, p + 6, then their second halves: that is how
// nibbles fall apart, and it lets four lanes add up a whole group.
#pragma once

#include "formats.h"
#include "isa/tables.h"

namespace localds::LOCALDS_ISA {

constexpr int kSpanGroups = kSpan / kGroup;

// Where the chunk of a group's first or second half lies among the bytes of a span, arranged so.
constexpr int64_t arranged_offset(int64_t group, int64_t half) {
  const int64_t g = group % kSpanGroups;
  return group / kSpanGroups * kSpan + kHalfGroup * (g % 2 * 8 + half * 4 + g / 2);
}
template <class D>
constexpr int64_t chunk_offset(int64_t group, int64_t half) {
  return D::kHalves ? group * kGroup + half * kHalfGroup : arranged_offset(group, half);
}

// Added to signed bytes where `dot` wants unsigned ones.
constexpr int kWideZero = kWideUnsigned ? 128 : 0;

struct Table {
  int8_t values[16];
};
constexpr Table shifted(const int8_t (&values)[16], int shift) {
  Table table = {};
  for (int i = 0; i < 16; ++i) table.values[i] = static_cast<int8_t>(values[i] + shift);
  return table;
}
constexpr Table kIq4Table = shifted(kIq4Values, kWideZero);
constexpr Table kFp4Table = shifted(kFp4Doubled, 12);

LOCALDS_INLINE void look_up(const Table& table, Quad& first, Quad& second) {
  first = lookup(table.values, first);
  second = lookup(table.values, second);
}

LOCALDS_INLINE void split(Quad v, Quad& low, Quad& high) {
  low = quad_and(v, 15);
  high = quad_and(quad_shift(v, 4, 4, 4, 4), 15);
}

LOCALDS_INLINE uint32_t word(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}
LOCALDS_INLINE uint64_t long_word(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}
LOCALDS_INLINE uint64_t join(uint32_t low, uint32_t high) {
  return low | static_cast<uint64_t>(high) << 32;
}

template <Type type>
struct Decoder;

// ---- Blocks of 32 elements: a float16 scale, perhaps a min, then the nibbles or bytes.

// The float16 at `stride` bytes in the first `groups` blocks; zero for the others.
template <int stride>
LOCALDS_INLINE Floats gather_scales(const uint8_t* p, int groups) {
  if (groups == kSpanGroups) return gather_halves<stride>(p);
  alignas(16) uint8_t halves[2 * kSpanGroups] = {};
  for (int g = 0; g < kSpanGroups && g < groups; ++g)
    std::memcpy(halves + 2 * g, p + g * stride, 2);
  return load_half(halves);
}

template <class Block>
struct SmallBlocks {
  static constexpr int kBlockBytes = sizeof(Block);
  static constexpr int kSpanBytes = kSpanGroups * sizeof(Block);
  static constexpr bool kHalves = false;
  static constexpr bool kMin = false;
  static constexpr bool kWide = false;
  static constexpr int kZero = 0;

  LOCALDS_INLINE static void scales(const uint8_t* span, int groups, Floats& s, Floats&) {
    s = gather_scales<kBlockBytes>(span, groups);
  }

  // Block i of a part; the last one again where there are fewer.
  LOCALDS_INLINE static const Block& block(const uint8_t* span, int part, int i, int groups) {
    const int g = part + 2 * i;
    return reinterpret_cast<const Block*>(span)[g < groups ? g : groups - 1];
  }
  LOCALDS_INLINE static void nibbles(const uint8_t* span, int part, int groups, Quad& first,
                                     Quad& second) {
    const auto qs = [&](int i) { return block(span, part, i, groups).qs; };
    split(load_chunks(qs(0), qs(1), qs(2), qs(3)), first, second);
  }
  LOCALDS_INLINE static void add_fifth_bits(const uint8_t* span, int part, int groups, Quad& first,
                                            Quad& second) {
    const auto qh = [&](int i) { return block(span, part, i, groups).qh; };
    first = add_bits(first, qh(0), qh(1), qh(2), qh(3), 16);
    second = add_bits(second, qh(0) + 2, qh(1) + 2, qh(2) + 2, qh(3) + 2, 16);
  }
};

template <class Block>
struct SmallBlocksWithMin : SmallBlocks<Block> {
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int groups, Floats& s, Floats& m) {
    s = gather_scales<sizeof(Block)>(span, groups);
    m = gather_scales<sizeof(Block)>(span + sizeof(Half), groups);
  }
};

template <>
struct Decoder<Type::Q4_0> : SmallBlocks<BlockQ4_0> {
  static constexpr int kZero = 8;

  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    nibbles(span, part, groups, first, second);
  }
};

template <>
struct Decoder<Type::Q4_1> : SmallBlocksWithMin<BlockQ4_1> {
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    nibbles(span, part, groups, first, second);
  }
};

template <>
struct Decoder<Type::Q5_0> : SmallBlocks<BlockQ5_0> {
  static constexpr int kZero = 16;

  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    nibbles(span, part, groups, first, second);
    add_fifth_bits(span, part, groups, first, second);
  }
};

template <>
struct Decoder<Type::Q5_1> : SmallBlocksWithMin<BlockQ5_1> {
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    nibbles(span, part, groups, first, second);
    add_fifth_bits(span, part, groups, first, second);
  }
};

template <>
struct Decoder<Type::Q8_0> : SmallBlocks<BlockQ8_0> {
  static constexpr bool kWide = true;
  static constexpr int kZero = kWideZero;

  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    const auto qs = [&](int i) { return block(span, part, i, groups).qs; };
    const auto half = [&](int64_t at) {
      const Quad v = load_chunks(qs(0) + at, qs(1) + at, qs(2) + at, qs(3) + at);
      return kWideUnsigned ? quad_xor(v, 128) : v;
    };
    first = half(0);
    second = half(kHalfGroup);
  }
};

template <>
struct Decoder<Type::IQ4_NL> : SmallBlocks<BlockIQ4_NL> {
  static constexpr bool kWide = true;
  static constexpr int kZero = kWideZero;

  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    nibbles(span, part, groups, first, second);
    look_up(kIq4Table, first, second);
  }
};

template <>
struct Decoder<Type::MXFP4> : SmallBlocks<BlockMXFP4> {
  static constexpr int kZero = 12;

  LOCALDS_INLINE static void scales(const uint8_t* span, int groups, Floats& s, Floats&) {
    const auto exponent = [&](int g) { return static_cast<uint64_t>(span[g * kBlockBytes]); };
    uint64_t exponents = 0;
    for (int g = 0; g < kSpanGroups && g < groups; ++g) exponents |= exponent(g) << (8 * g);
    s = powers_of_two(exponents);
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int groups, Quad& first,
                                   Quad& second) {
    nibbles(span, part, groups, first, second);
    look_up(kFp4Table, first, second);
  }
};

// ---- Blocks of 256 elements.

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

// Four groups of Q2_K and Q3_K: bits 0 and 1 of 32 bytes, bits 2 and 3, and so on.
LOCALDS_INLINE void two_bits(const uint8_t* qs, Quad& first, Quad& second) {
  const Quad v = repeat_two_chunks(qs);
  first = quad_and(quad_shift(v, 0, 0, 2, 2), 3);
  second = quad_and(quad_shift(v, 4, 4, 6, 6), 3);
}

template <>
struct Decoder<Type::Q2_K> : LargeBlock<BlockQ2_K> {
  static constexpr bool kHalves = true;
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, Shorts& s, Shorts& m, Floats& d,
                                    Floats& dmin) {
    const Block& b = block(span);
    constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0f;
    const uint64_t low = long_word(b.scales), high = long_word(b.scales + 8);
    s = uint8_to_shorts(low & kNibbles, high & kNibbles);
    m = uint8_to_shorts(low >> 4 & kNibbles, high >> 4 & kNibbles);
    broadcast_two_halves(b.d.bytes, d, dmin);
    dmin = negate(dmin);
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int, Quad& first, Quad& second) {
    two_bits(block(span).qs + 32 * part, first, second);
  }
};

template <>
struct Decoder<Type::Q3_K> : LargeBlock<BlockQ3_K> {
  static constexpr bool kHalves = true;
  static constexpr int kZero = 4;

  LOCALDS_INLINE static void scales(const uint8_t* span, Shorts& s, Shorts&, Floats& d, Floats&) {
    const Block& b = block(span);
    const uint32_t a0 = word(b.scales), a1 = word(b.scales + 4), top = word(b.scales + 8);
    const auto six_bits = [](uint32_t low, uint32_t high) {
      return (low & 0x0f0f0f0fu) | (high & 0x03030303u) << 4;
    };
    s = add(uint8_to_shorts(join(six_bits(a0, top), six_bits(a1, top >> 2)),
                            join(six_bits(a0 >> 4, top >> 4), six_bits(a1 >> 4, top >> 6))),
            -32);
    d = broadcast_half(b.d.bytes);
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int, Quad& first, Quad& second) {
    const Block& b = block(span);
    const Quad mask = repeat_two_chunks(b.hmask);
    const int g = 4 * part;
    two_bits(b.qs + 32 * part, first, second);
    first = quad_or(first, select_bits(mask, g, g, g + 1, g + 1, 4));
    second = quad_or(second, select_bits(mask, g + 2, g + 2, g + 3, g + 3, 4));
  }
};

// Eight 6-bit scales and mins of Q4_K and Q5_K.
template <class Block>
LOCALDS_INLINE void six_bit_scales(const Block& b, Floats& s, Floats& m) {
  const uint32_t a0 = word(b.scales), a1 = word(b.scales + 4), a2 = word(b.scales + 8);
  constexpr uint32_t kSix = 0x3f3f3f3fu, kFour = 0x0f0f0f0fu, kTop = 0x30303030u;
  const uint64_t scales = join(a0 & kSix, (a2 & kFour) | (a0 >> 2 & kTop));
  const uint64_t mins = join(a1 & kSix, (a2 >> 4 & kFour) | (a1 >> 2 & kTop));
  Floats d, dmin;
  broadcast_two_halves(b.d.bytes, d, dmin);
  s = multiply(uint8_to_floats(scales), d);
  m = multiply(uint8_to_floats(mins), negate(dmin));
}

// Four groups of Q4_K and Q5_K: 32 bytes hold an even group low, the next one high.
LOCALDS_INLINE void long_nibbles(const uint8_t* qs, int part, Quad& first, Quad& second) {
  const int n = 4 * part;
  load_even_odd(qs, first, second);
  first = quad_and(quad_shift(first, n, n, n, n), 15);
  second = quad_and(quad_shift(second, n, n, n, n), 15);
}

template <>
struct Decoder<Type::Q4_K> : LargeBlock<BlockQ4_K> {
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats& s, Floats& m) {
    six_bit_scales(block(span), s, m);
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int, Quad& first, Quad& second) {
    long_nibbles(block(span).qs, part, first, second);
  }
};

template <>
struct Decoder<Type::Q5_K> : LargeBlock<BlockQ5_K> {
  static constexpr bool kMin = true;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats& s, Floats& m) {
    six_bit_scales(block(span), s, m);
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int, Quad& first, Quad& second) {
    const Block& b = block(span);
    const auto high = [&](const uint8_t* qh) {
      return select_bits(repeat_chunk(qh), part, part + 2, part + 4, part + 6, 16);
    };
    long_nibbles(b.qs, part, first, second);
    first = quad_or(first, high(b.qh));
    second = quad_or(second, high(b.qh + kHalfGroup));
  }
};

template <>
struct Decoder<Type::Q6_K> : LargeBlock<BlockQ6_K> {
  static constexpr bool kHalves = true;
  static constexpr int kZero = 32;

  LOCALDS_INLINE static void scales(const uint8_t* span, Shorts& s, Shorts&, Floats& d, Floats&) {
    s = load_int8_shorts(block(span).scales);
    d = broadcast_half(block(span).d.bytes);
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int, Quad& first, Quad& second) {
    const Block& b = block(span);
    const Quad high = repeat_two_chunks(b.qh + 32 * part);
    split(load_quad(b.ql + 64 * part), first, second);
    first = quad_or(first, quad_and(quad_shift(high, -4, -4, -2, -2), 48));
    second = quad_or(second, quad_and(quad_shift(high, 0, 0, 2, 2), 48));
  }
};

template <>
struct Decoder<Type::IQ4_XS> : LargeBlock<BlockIQ4_XS> {
  static constexpr bool kWide = true;
  static constexpr int kZero = kWideZero;

  LOCALDS_INLINE static void scales(const uint8_t* span, int, Floats& s, Floats&) {
    const Block& b = block(span);
    const uint32_t top = static_cast<uint32_t>(b.scales_h[0] | b.scales_h[1] << 8);
    const Floats low = to_floats(unpack_fields<4, 4>(word(b.scales_l)));
    const Floats high = to_floats(unpack_fields<2, 2>(top));
    const Floats scale = subtract(fma(high, floats(16), low), floats(32));
    s = multiply(scale, broadcast_half(b.d.bytes));
  }
  LOCALDS_INLINE static void quads(const uint8_t* span, int part, int, Quad& first, Quad& second) {
    Quad chunks[2];
    load_even_odd(block(span).qs, chunks[0], chunks[1]);
    split(chunks[part], first, second);
    look_up(kIq4Table, first, second);
  }
};

// The scales and mins of a span: of eight groups, or of their sixteen halves.
template <class D>
LOCALDS_INLINE void decode_scales(const uint8_t* span, int groups, float* scales, float* mins) {
  if constexpr (D::kHalves) {
    Shorts s, m;
    Floats d, dmin;
    D::scales(span, s, m, d, dmin);
    store_halves(scales, half_factors(s, d));
    if constexpr (D::kMin) store_halves(mins, half_factors(m, dmin));
  } else {
    Floats s, m;
    D::scales(span, groups, s, m);
    store(scales, s);
    if constexpr (D::kMin) store(mins, m);
  }
}

// All bytes of a span.
template <class D>
LOCALDS_INLINE void decode_span(const uint8_t* span, int groups, uint8_t* out) {
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    Quad first, second;
    D::quads(span, part, groups, first, second);
    store_quad(out + 128 * part, first);
    store_quad(out + 128 * part + 64, second);
  }
}

}  // namespace localds::LOCALDS_ISA
