// The part of the vector wrapper that AVX2 and AVX-512 share: 32 bytes, 8 integers, 8 floats.
//
// Each instruction set offers the same names; decoders and products are written on them and
// compiled once per set, inside the namespace LOCALDS_ISA.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

#define LOCALDS_INLINE inline __attribute__((always_inline))

namespace localds::LOCALDS_ISA {

using Bytes = __m256i;  // 32 x uint8
using Ints = __m256i;   // 8 x int32
using Floats = __m256;  // 8 x float

LOCALDS_INLINE Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LOCALDS_INLINE __m128i load_chunk(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
LOCALDS_INLINE void store_bytes(void* p, Bytes v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}

// Lane i of the result is bits [shift * i, shift * i + width) of `bits`.
template <int shift, int width>
LOCALDS_INLINE Ints unpack_fields(uint32_t bits) {
  const __m256i shifts =
      _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(shift));
  return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), shifts),
                          _mm256_set1_epi32((1 << width) - 1));
}

LOCALDS_INLINE Floats floats(float value) { return _mm256_set1_ps(value); }
LOCALDS_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
LOCALDS_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
LOCALDS_INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
LOCALDS_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
LOCALDS_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
LOCALDS_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
LOCALDS_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

LOCALDS_INLINE float horizontal_sum(Floats v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

LOCALDS_INLINE Floats negate(Floats v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }

// 8 bytes, given as an integer, to floats.
LOCALDS_INLINE Floats uint8_to_floats(uint64_t bytes) {
  return to_floats(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
}
LOCALDS_INLINE Floats load_uint8(const uint8_t* p) {
  return to_floats(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
LOCALDS_INLINE Floats load_int8(const uint8_t* p) {
  return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// 2^(e - 128) of eight bytes e, see e8m0_half_to_float.
LOCALDS_INLINE Floats powers_of_two(uint64_t bytes) {
  const __m256i e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
  const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
  // For e = 0 and 1, which are subnormal; smaller than the other for all others.
  const __m256i subnormal = _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(1)), 21);
  return _mm256_castsi256_ps(_mm256_max_epi32(normal, subnormal));
}
using Shorts = __m256i;  // 16 x int16
// 16 bytes, given as two integers or in memory, to int16.
LOCALDS_INLINE Shorts uint8_to_shorts(uint64_t low, uint64_t high) {
  return _mm256_cvtepu8_epi16(
      _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)));
}
LOCALDS_INLINE Shorts load_int8_shorts(const void* p) {
  return _mm256_cvtepi8_epi16(load_chunk(p));
}
LOCALDS_INLINE Shorts add(Shorts v, int value) {
  return _mm256_add_epi16(v, _mm256_set1_epi16(static_cast<int16_t>(value)));
}
// Products with 16 int16 of memory, neighbours added; the sums of neighbours alone.
LOCALDS_INLINE Ints dot_neighbours(Shorts v, const int16_t* p) {
  return _mm256_madd_epi16(v, load_bytes(p));
}
LOCALDS_INLINE Ints sum_neighbours(const int16_t* p) {
  return dot_neighbours(_mm256_set1_epi16(1), p);
}

// The largest magnitude of 32 floats; NaN if there is one, as its bits compare above all others.
LOCALDS_INLINE float largest_magnitude(const Floats (&v)[4]) {
  const auto magnitude = [](__m256 f) {
    return _mm256_and_si256(_mm256_castps_si256(f), _mm256_set1_epi32(0x7fffffff));
  };
  const __m256i m = _mm256_max_epi32(_mm256_max_epi32(magnitude(v[0]), magnitude(v[1])),
                                     _mm256_max_epi32(magnitude(v[2]), magnitude(v[3])));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return std::bit_cast<float>(_mm_cvtsi128_si32(four));
}

// 32 floats times `factor`, rounded to the nearest int8, ties to even.
LOCALDS_INLINE Bytes round_to_bytes(const Floats (&v)[4], Floats factor) {
  const auto whole = [&](__m256 f) { return _mm256_cvtps_epi32(_mm256_mul_ps(f, factor)); };
  const __m256i low = _mm256_packs_epi32(whole(v[0]), whole(v[1]));
  const __m256i high = _mm256_packs_epi32(whole(v[2]), whole(v[3]));
  // Packing works within 128 bits; put the groups of four back in order.
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The sums of the first and of the last 16 signed bytes.
LOCALDS_INLINE void half_sums(Bytes v, int16_t& first, int16_t& second) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), v);
  __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xb1));
  first = static_cast<int16_t>(_mm256_extract_epi32(sums, 0));
  second = static_cast<int16_t>(_mm256_extract_epi32(sums, 4));
}

LOCALDS_INLINE void store4(float* p, __m128 v) { _mm_storeu_ps(p, v); }

// The float16 at p, and the next one, in all lanes.
LOCALDS_INLINE Floats broadcast_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return floats(_cvtsh_ss(h));
}
LOCALDS_INLINE void broadcast_two_halves(const uint8_t* p, Floats& first, Floats& second) {
  int32_t both;
  std::memcpy(&both, p, 4);
  const __m128 v = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
  first = _mm256_broadcastss_ps(v);
  second = _mm256_broadcastss_ps(_mm_movehdup_ps(v));
}
LOCALDS_INLINE Floats load_half(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LOCALDS_INLINE Floats load_bfloat16(const uint8_t* p) {
  const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}
// 8 float16, `stride` bytes apart.
template <int stride>
LOCALDS_INLINE Floats gather_halves(const uint8_t* p) {
  const auto at = [p](int i) {
    int16_t h;
    std::memcpy(&h, p + i * stride, 2);
    return h;
  };
  return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
}

// Fetches a cache line into the second cache, or into the first.
LOCALDS_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}
LOCALDS_INLINE void prefetch_near(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// Four rows of four 32-bit units to four columns, at out, out + a, out + b and out + a + b.
LOCALDS_INLINE void transpose4(const void* r0, const void* r1, const void* r2, const void* r3,
                               uint32_t* out, int64_t a, int64_t b) {
  const auto row = [](const void* p) { return _mm_loadu_ps(static_cast<const float*>(p)); };
  const auto put = [](uint32_t* p, __m128 v) { _mm_storeu_ps(reinterpret_cast<float*>(p), v); };
  __m128 c0 = row(r0), c1 = row(r1), c2 = row(r2), c3 = row(r3);
  _MM_TRANSPOSE4_PS(c0, c1, c2, c3);
  put(out, c0);
  put(out + a, c1);
  put(out + b, c2);
  put(out + a + b, c3);
}

}  // namespace localds::LOCALDS_ISA
