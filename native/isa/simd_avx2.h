// The vector wrapper over AVX2 with FMA and F16C.
#pragma once

#define LOCALDS_ISA avx2
#include "isa/simd_x86.h"
#include "kernels.h"

namespace localds::LOCALDS_ISA {

// `dot` takes unsigned bytes up to 63 only, so wider values are kept signed.
constexpr bool kWideUnsigned = false;

// Four chunks of 16 bytes, halves of groups.
struct Quad {
  Bytes v[2];
};
struct QuadInts {
  Ints v[2];
};
struct QuadFloats {
  Floats v[2];
};

LOCALDS_INLINE Quad load_chunks(const void* p0, const void* p1, const void* p2, const void* p3) {
  return {{_mm256_set_m128i(load_chunk(p1), load_chunk(p0)),
           _mm256_set_m128i(load_chunk(p3), load_chunk(p2))}};
}
LOCALDS_INLINE Quad load_quad(const void* p) {
  const auto* from = static_cast<const uint8_t*>(p);
  return {{load_bytes(from), load_bytes(from + 32)}};
}
// One chunk in all four places; two chunks in both halves.
LOCALDS_INLINE Quad repeat_chunk(const void* p) {
  const __m256i v = _mm256_broadcastsi128_si256(load_chunk(p));
  return {{v, v}};
}
LOCALDS_INLINE Quad repeat_two_chunks(const void* p) { return {{load_bytes(p), load_bytes(p)}}; }
// Eight chunks in a row: those with even numbers, those with odd ones.
LOCALDS_INLINE void load_even_odd(const uint8_t* p, Quad& even, Quad& odd) {
  even = load_chunks(p, p + 32, p + 64, p + 96);
  odd = load_chunks(p + 16, p + 48, p + 80, p + 112);
}
LOCALDS_INLINE void store_quad(void* p, Quad v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v.v[0]);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, v.v[1]);
}
LOCALDS_INLINE Quad quad_and(Quad v, int mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {{_mm256_and_si256(v.v[0], m), _mm256_and_si256(v.v[1], m)}};
}
LOCALDS_INLINE Quad quad_or(Quad a, Quad b) {
  return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
}
LOCALDS_INLINE Quad quad_xor(Quad v, int mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {{_mm256_xor_si256(v.v[0], m), _mm256_xor_si256(v.v[1], m)}};
}

// Shifts each chunk right by its n (left by -n), known at compile time. Bits of the neighbour byte
// come in: mask them off.
LOCALDS_INLINE Quad quad_shift(Quad v, int n0, int n1, int n2, int n3) {
  const auto all = [](__m256i b, int n) {
    return n >= 0 ? _mm256_srli_epi16(b, n) : _mm256_slli_epi16(b, -n);
  };
  const auto shift = [&](__m256i b, int low, int high) {
    return low == high ? all(b, low) : _mm256_blend_epi32(all(b, low), all(b, high), 0xf0);
  };
  return {{shift(v.v[0], n0, n1), shift(v.v[1], n2, n3)}};
}

// Looks up nibbles in 16 bytes.
LOCALDS_INLINE Quad lookup(const int8_t* table, Quad nibbles) {
  const __m256i t = _mm256_broadcastsi128_si256(load_chunk(table));
  return {{_mm256_shuffle_epi8(t, nibbles.v[0]), _mm256_shuffle_epi8(t, nibbles.v[1])}};
}

// Bytes that are `value` (a power of two) where a chunk's bytes have their bit b set, else 0.
LOCALDS_INLINE Quad select_bits(Quad v, int b0, int b1, int b2, int b3, int value) {
  const auto test = [](__m256i bytes, int low, int high) {
    const __m256i bits = _mm256_set_m128i(_mm_set1_epi8(static_cast<char>(1 << high)),
                                          _mm_set1_epi8(static_cast<char>(1 << low)));
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
  };
  return quad_and({{test(v.v[0], b0, b1), test(v.v[1], b2, b3)}}, value);
}

// Adds `value` to byte j of a chunk where bit j of the two bytes at its p is set.
LOCALDS_INLINE Quad add_bits(Quad v, const uint8_t* p0, const uint8_t* p1, const uint8_t* p2,
                             const uint8_t* p3, int value) {
  const auto spread = [](const uint8_t* p) {
    int16_t two;
    std::memcpy(&two, p, 2);
    return _mm_shuffle_epi8(_mm_set1_epi16(two), _mm_set_epi64x(0x0101010101010101, 0));
  };
  const auto test = [&](const uint8_t* low, const uint8_t* high) {
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i bits = _mm256_set_m128i(spread(high), spread(low));
    return _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), bit);
  };
  return quad_or(v, quad_and({{test(p0, p1), test(p2, p3)}}, value));
}

// acc + the sums of 4 adjacent products: w unsigned up to 63 (signed if wide), x signed.
template <bool wide>
LOCALDS_INLINE Ints dot(Ints acc, Bytes w, Bytes x) {
  // Pairs are summed in int16, where 2 * 128 * 127 fits. A wide w gives its sign to x.
  const __m256i pairs = wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                             : _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// The same for two pairs of vectors.
template <bool wide>
LOCALDS_INLINE Ints dot_two(Ints acc, Bytes w0, Bytes x0, Bytes w1, Bytes x1) {
  if constexpr (wide) return dot<wide>(dot<wide>(acc, w0, x0), w1, x1);
  // Bytes that are not wide are at most 63, and four products of 63 * 127 still fit int16.
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Sums of 4 adjacent products with 64 activations; of two quads with 128.
template <bool wide>
LOCALDS_INLINE QuadInts dot_quad(Quad w, const int8_t* x) {
  return {
      {dot<wide>(Ints(), w.v[0], load_bytes(x)), dot<wide>(Ints(), w.v[1], load_bytes(x + 32))}};
}
template <bool wide>
LOCALDS_INLINE QuadInts dot_quads(Quad first, Quad second, const int8_t* x) {
  const auto both = [&](int i) {
    return dot_two<wide>(Ints(), first.v[i], load_bytes(x + 32 * i), second.v[i],
                         load_bytes(x + 64 + 32 * i));
  };
  return {{both(0), both(1)}};
}
LOCALDS_INLINE QuadFloats to_floats(QuadInts v) { return {{to_floats(v.v[0]), to_floats(v.v[1])}}; }
LOCALDS_INLINE QuadFloats fma(QuadFloats a, QuadFloats b, QuadFloats c) {
  return {{fma(a.v[0], b.v[0], c.v[0]), fma(a.v[1], b.v[1], c.v[1])}};
}
LOCALDS_INLINE Floats fold(QuadFloats v) { return add(v.v[0], v.v[1]); }

// A factor for each of eight groups, or for each of their sixteen halves.
struct Factors {
  Floats v[2];
};
LOCALDS_INLINE Factors group_factors(Floats f) { return {{f, f}}; }
// Those of the halves, times those of their groups.
LOCALDS_INLINE Factors half_factors(Shorts halves, Floats groups) {
  const auto eight = [&](__m128i v, int g) {
    const __m256i twice = _mm256_setr_epi32(g, g, g + 1, g + 1, g + 2, g + 2, g + 3, g + 3);
    return multiply(to_floats(_mm256_cvtepi16_epi32(v)), _mm256_permutevar8x32_ps(groups, twice));
  };
  return {
      {eight(_mm256_castsi256_si128(halves), 0), eight(_mm256_extracti128_si256(halves, 1), 4)}};
}
LOCALDS_INLINE void store_halves(float* p, const Factors& f) {
  store(p, f.v[0]);
  store(p + 8, f.v[1]);
}
// Lanes a and b, four times each.
LOCALDS_INLINE Floats spread(Floats v, int a, int b) {
  return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(a, a, a, a, b, b, b, b));
}
// Those of groups first, + 2, + 4, + 6, each in the four lanes of a chunk.
LOCALDS_INLINE QuadFloats spread_groups(const Factors& f, int first) {
  return {{spread(f.v[0], first, first + 2), spread(f.v[0], first + 4, first + 6)}};
}
// Those of the halves of groups 2 * i and 2 * i + 1.
LOCALDS_INLINE QuadFloats spread_halves(const Factors& f, int i) {
  const int at = i % 2 * 4;
  return {{spread(f.v[i / 2], at, at + 1), spread(f.v[i / 2], at + 2, at + 3)}};
}

// The widest vectors; they hold the rows of a panel, or floats.
using Wide = Floats;
using WideInts = Ints;
constexpr int kLanes = 8;
// Tokens that a panel is multiplied with at a time: one scale per 32, per 16.
constexpr int kTile = 4;
constexpr int kTileHalves = 4;
// The tile of gemm_nt and of gemm_nn (rows, vectors).
constexpr int kNtRows = 2, kNtCols = 4;
constexpr int kNnRows = 4, kNnVectors = 2;

LOCALDS_INLINE WideInts load_wide_bytes(const void* p) { return load_bytes(p); }
LOCALDS_INLINE WideInts broadcast4(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return _mm256_set1_epi32(value);
}

// 16 bytes of each of 8 rows to four vectors with 4 bytes of every row, at
// out, out + a, out + b and out + a + b.
LOCALDS_INLINE void interleave(const uint8_t* rows, int64_t stride, uint32_t* out, int64_t a,
                               int64_t b) {
  const auto load = [&](int r) {
    const uint8_t* p = rows + r * stride;
    return _mm256_set_m128i(load_chunk(p + 4 * stride), load_chunk(p));
  };
  const auto put = [&](int64_t at, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + at), v);
  };
  const __m256i r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
  const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
  put(0, _mm256_unpacklo_epi64(low01, low23));
  put(a, _mm256_unpackhi_epi64(low01, low23));
  put(b, _mm256_unpacklo_epi64(high01, high23));
  put(a + b, _mm256_unpackhi_epi64(high01, high23));
}

LOCALDS_INLINE Wide wide(float value) { return floats(value); }
LOCALDS_INLINE Wide load_wide(const float* p) { return load(p); }
LOCALDS_INLINE void store_wide(float* p, Wide v) { store(p, v); }

LOCALDS_INLINE __m256i partial_mask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The first `count` lanes; the others read as zero and are not written.
LOCALDS_INLINE Wide load_partial(const float* p, int count) {
  return _mm256_maskload_ps(p, partial_mask(count));
}
LOCALDS_INLINE void store_partial(float* p, Wide v, int count) {
  _mm256_maskstore_ps(p, partial_mask(count), v);
}

LOCALDS_INLINE Wide load_wide_half(const uint8_t* p) { return load_half(p); }
LOCALDS_INLINE Wide load_wide_bfloat16(const uint8_t* p) { return load_bfloat16(p); }

LOCALDS_INLINE Wide divide(Wide a, Wide b) { return _mm256_div_ps(a, b); }
// The larger; b if either is NaN.
LOCALDS_INLINE Wide maximum(Wide a, Wide b) { return _mm256_max_ps(a, b); }
LOCALDS_INLINE Wide minimum(Wide a, Wide b) { return _mm256_min_ps(a, b); }
LOCALDS_INLINE Wide round_nearest(Wide v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// v * 2^n for whole n in [-252, 254], in two steps so that subnormal results are right.
LOCALDS_INLINE Wide scale_by_power(Wide v, Wide n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return multiply(multiply(v, power(half)), power(_mm256_sub_epi32(whole, half)));
}

// The sums of four vectors.
LOCALDS_INLINE __m128 horizontal_sum4(Wide a, Wide b, Wide c, Wide d) {
  const auto fold = [](__m256 v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  };
  __m128 r0 = fold(a), r1 = fold(b), r2 = fold(c), r3 = fold(d);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  return _mm_add_ps(_mm_add_ps(r0, r1), _mm_add_ps(r2, r3));
}

}  // namespace localds::LOCALDS_ISA
