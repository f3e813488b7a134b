// The vector wrapper over AVX2 with FMA and F16C.
#pragma once

#define LOCALDS_ISA avx2
#include "isa/simd_x86.h"

namespace localds::LOCALDS_ISA {

// `dot` takes unsigned bytes up to 127 only, so wider values are kept signed.
constexpr bool kWideUnsigned = false;

// Byte j is `value` where bit j of the four bytes at p is set, else 0.
LOCALDS_INLINE Bytes expand_bits(const uint8_t* p, int value) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(bits),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  return bytes_and(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), value);
}

// acc + the sums of 4 adjacent products: w unsigned up to 127 (signed if wide), x signed.
template <bool wide>
LOCALDS_INLINE Ints dot(Ints acc, Bytes w, Bytes x) {
  // Pairs are summed in int16, where 2 * 128 * 127 fits. A wide w gives its sign to x.
  const __m256i pairs = wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                             : _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
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
