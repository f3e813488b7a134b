// The vector wrapper over AVX-512 (F, BW, DQ, VL, VNNI). Single rows use 32-byte vectors, panels
// and floats 64-byte ones.
#pragma once

#ifndef LOCALDS_ISA  // isa/amx.cpp is compiled on it under a name of its own
#define LOCALDS_ISA avx512
#endif
#include "isa/simd_x86.h"
#include "kernels.h"

namespace localds::LOCALDS_ISA {

// `dot` takes all unsigned bytes.
constexpr bool kWideUnsigned = true;

// Four chunks of 16 bytes, halves of groups.
using Quad = __m512i;
using QuadInts = __m512i;
using QuadFloats = __m512;

LOCALDS_INLINE Quad load_chunks(const void* p0, const void* p1, const void* p2, const void* p3) {
  __m512i v = _mm512_broadcast_i32x4(load_chunk(p0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load_chunk(p1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load_chunk(p2));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, load_chunk(p3));
}
LOCALDS_INLINE Quad load_quad(const void* p) { return _mm512_loadu_si512(p); }
// One chunk in all four places; two chunks in both halves.
LOCALDS_INLINE Quad repeat_chunk(const void* p) { return _mm512_broadcast_i32x4(load_chunk(p)); }
LOCALDS_INLINE Quad repeat_two_chunks(const void* p) {
  return _mm512_broadcast_i64x4(load_bytes(p));
}
// Eight chunks in a row: those with even numbers, those with odd ones.
LOCALDS_INLINE void load_even_odd(const uint8_t* p, Quad& even, Quad& odd) {
  const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 64);
  even = _mm512_shuffle_i64x2(low, high, 0x88);
  odd = _mm512_shuffle_i64x2(low, high, 0xdd);
}
LOCALDS_INLINE void store_quad(void* p, Quad v) { _mm512_storeu_si512(p, v); }
LOCALDS_INLINE Quad quad_and(Quad v, int mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
LOCALDS_INLINE Quad quad_or(Quad a, Quad b) { return _mm512_or_si512(a, b); }
LOCALDS_INLINE Quad quad_xor(Quad v, int mask) {
  return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}

LOCALDS_INLINE __m512i per_chunk(int n0, int n1, int n2, int n3) {
  return _mm512_setr_epi32(n0, n0, n0, n0, n1, n1, n1, n1, n2, n2, n2, n2, n3, n3, n3, n3);
}
// Shifts each chunk right by its n (left by -n), known at compile time. Bits of the neighbour byte
// come in: mask them off. (A rotation, as it takes both directions.)
LOCALDS_INLINE Quad quad_shift(Quad v, int n0, int n1, int n2, int n3) {
  if (n0 == n1 && n0 == n2 && n0 == n3 && n0 >= 0) return _mm512_srli_epi16(v, n0);
  return _mm512_rorv_epi32(v, per_chunk(n0, n1, n2, n3));
}

// Looks up nibbles in 16 bytes.
LOCALDS_INLINE Quad lookup(const int8_t* table, Quad nibbles) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_chunk(table)), nibbles);
}

// Bytes that are `value` (a power of two) where a chunk's bytes have their bit b set, else 0.
LOCALDS_INLINE Quad select_bits(Quad v, int b0, int b1, int b2, int b3, int value) {
  const int to = std::countr_zero(static_cast<unsigned>(value));
  return quad_and(quad_shift(v, b0 - to, b1 - to, b2 - to, b3 - to), value);
}

// Adds `value` to byte j of a chunk where bit j of the two bytes at its p is set.
LOCALDS_INLINE Quad add_bits(Quad v, const uint8_t* p0, const uint8_t* p1, const uint8_t* p2,
                             const uint8_t* p3, int value) {
  const auto bits = [](const uint8_t* p) {
    uint16_t two;
    std::memcpy(&two, p, 2);
    return static_cast<uint64_t>(two);
  };
  const __mmask64 set = (bits(p0) | bits(p1) << 16) | (bits(p2) << 32 | bits(p3) << 48);
  return _mm512_mask_add_epi8(v, set, v, _mm512_set1_epi8(static_cast<char>(value)));
}

// The widest vectors; they hold the rows of a panel, or floats.
using Wide = __m512;
using WideInts = __m512i;
constexpr int kLanes = 16;
// Tokens that a panel is multiplied with at a time: one scale per 32, per 16.
constexpr int kTile = 12;
constexpr int kTileHalves = 8;
// The tile of gemm_nt and of gemm_nn (rows, vectors).
constexpr int kNtRows = 4, kNtCols = 4;
constexpr int kNnRows = 8, kNnVectors = 2;

// acc + the sums of 4 adjacent products: w unsigned, x signed.
template <bool>
LOCALDS_INLINE WideInts dot(WideInts acc, WideInts w, WideInts x) {
  return _mm512_dpbusd_epi32(acc, w, x);
}

// Sums of 4 adjacent products with 64 activations; of two quads with 128.
template <bool wide>
LOCALDS_INLINE QuadInts dot_quad(Quad w, const int8_t* x) {
  return dot<wide>(QuadInts(), w, _mm512_loadu_si512(x));
}
template <bool wide>
LOCALDS_INLINE QuadInts dot_quads(Quad first, Quad second, const int8_t* x) {
  return dot<wide>(dot_quad<wide>(first, x), second, _mm512_loadu_si512(x + 64));
}
LOCALDS_INLINE Floats fold(QuadFloats v) {
  return add(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

// A factor for each of eight groups, or for each of their sixteen halves.
using Factors = __m512;
LOCALDS_INLINE Factors group_factors(Floats f) { return _mm512_castps256_ps512(f); }
// Those of the halves, times those of their groups.
LOCALDS_INLINE Factors half_factors(Shorts halves, Floats groups) {
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(halves)),
                       _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(groups)));
}
LOCALDS_INLINE void store_halves(float* p, Factors f) { _mm512_storeu_ps(p, f); }
// Those of groups first, + 2, + 4, + 6, each in the four lanes of a chunk.
LOCALDS_INLINE QuadFloats spread_groups(Factors f, int first) {
  return _mm512_permutexvar_ps(per_chunk(first, first + 2, first + 4, first + 6), f);
}
// Those of the halves of groups 2 * i and 2 * i + 1.
LOCALDS_INLINE QuadFloats spread_halves(Factors f, int i) {
  return _mm512_permutexvar_ps(per_chunk(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3), f);
}

// The same for two pairs of vectors.
template <bool wide>
LOCALDS_INLINE WideInts dot_two(WideInts acc, WideInts w0, WideInts x0, WideInts w1, WideInts x1) {
  return dot<wide>(dot<wide>(acc, w0, x0), w1, x1);
}

LOCALDS_INLINE WideInts load_wide_bytes(const void* p) { return _mm512_loadu_si512(p); }
LOCALDS_INLINE WideInts broadcast4(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
}

// 16 bytes of each of 16 rows to four vectors with 4 bytes of every row, at
// out, out + a, out + b and out + a + b.
LOCALDS_INLINE void interleave(const uint8_t* rows, int64_t stride, uint32_t* out, int64_t a,
                               int64_t b) {
  const auto load = [&](int r) {
    const uint8_t* p = rows + r * stride;
    return load_chunks(p, p + 4 * stride, p + 8 * stride, p + 12 * stride);
  };
  const __m512i r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
  const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
  _mm512_store_si512(out, _mm512_unpacklo_epi64(low01, low23));
  _mm512_store_si512(out + a, _mm512_unpackhi_epi64(low01, low23));
  _mm512_store_si512(out + b, _mm512_unpacklo_epi64(high01, high23));
  _mm512_store_si512(out + a + b, _mm512_unpackhi_epi64(high01, high23));
}

LOCALDS_INLINE Wide to_floats(WideInts v) { return _mm512_cvtepi32_ps(v); }
LOCALDS_INLINE Wide wide(float value) { return _mm512_set1_ps(value); }
LOCALDS_INLINE Wide load_wide(const float* p) { return _mm512_loadu_ps(p); }
LOCALDS_INLINE void store_wide(float* p, Wide v) { _mm512_storeu_ps(p, v); }

LOCALDS_INLINE __mmask16 partial_mask(int count) {
  return static_cast<__mmask16>((1u << count) - 1);
}
// The first `count` lanes; the others read as zero and are not written.
LOCALDS_INLINE Wide load_partial(const float* p, int count) {
  return _mm512_maskz_loadu_ps(partial_mask(count), p);
}
LOCALDS_INLINE void store_partial(float* p, Wide v, int count) {
  _mm512_mask_storeu_ps(p, partial_mask(count), v);
}

LOCALDS_INLINE Wide load_wide_half(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LOCALDS_INLINE Wide load_wide_bfloat16(const uint8_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

LOCALDS_INLINE Wide add(Wide a, Wide b) { return _mm512_add_ps(a, b); }
LOCALDS_INLINE Wide subtract(Wide a, Wide b) { return _mm512_sub_ps(a, b); }
LOCALDS_INLINE Wide multiply(Wide a, Wide b) { return _mm512_mul_ps(a, b); }
LOCALDS_INLINE Wide divide(Wide a, Wide b) { return _mm512_div_ps(a, b); }
LOCALDS_INLINE Wide fma(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
// The larger; b if either is NaN.
LOCALDS_INLINE Wide maximum(Wide a, Wide b) { return _mm512_max_ps(a, b); }
LOCALDS_INLINE Wide minimum(Wide a, Wide b) { return _mm512_min_ps(a, b); }
LOCALDS_INLINE Wide round_nearest(Wide v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// v * 2^n for whole n.
LOCALDS_INLINE Wide scale_by_power(Wide v, Wide n) { return _mm512_scalef_ps(v, n); }

// The sums of four vectors.
LOCALDS_INLINE __m128 horizontal_sum4(Wide a, Wide b, Wide c, Wide d) {
  const auto fold = [](__m512 v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  };
  __m128 r0 = fold(a), r1 = fold(b), r2 = fold(c), r3 = fold(d);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  return _mm_add_ps(_mm_add_ps(r0, r1), _mm_add_ps(r2, r3));
}

}  // namespace localds::LOCALDS_ISA
