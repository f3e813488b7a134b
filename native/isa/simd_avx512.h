// The vector wrapper over AVX-512 (F, BW, DQ, VL, VNNI). Single rows use 32-byte vectors, panels
// and floats 64-byte ones.
#pragma once

#define LOCALDS_ISA avx512
#include "isa/simd_x86.h"

namespace localds::LOCALDS_ISA {

// `dot` takes all unsigned bytes.
constexpr bool kWideUnsigned = true;

// Byte j is `value` where bit j of the four bytes at p is set, else 0.
LOCALDS_INLINE Bytes expand_bits(const uint8_t* p, int value) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm256_maskz_set1_epi8(bits, static_cast<char>(value));
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
LOCALDS_INLINE Ints dot(Ints acc, Bytes w, Bytes x) {
  return _mm256_dpbusd_epi32(acc, w, x);
}
template <bool>
LOCALDS_INLINE WideInts dot(WideInts acc, WideInts w, WideInts x) {
  return _mm512_dpbusd_epi32(acc, w, x);
}

LOCALDS_INLINE WideInts load_wide_bytes(const void* p) { return _mm512_loadu_si512(p); }
LOCALDS_INLINE WideInts broadcast4(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
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
