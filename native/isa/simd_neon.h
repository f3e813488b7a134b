// The vector wrapper over NEON with dot products (Armv8.2).
#pragma once

#define LOCALDS_ISA neon
#define LOCALDS_INLINE inline __attribute__((always_inline))

#include <arm_neon.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace localds::LOCALDS_ISA {

// `dot` takes signed bytes, which unsigned ones up to 63 are, too.
constexpr bool kWideUnsigned = false;

struct Bytes {  // 32 x int8
  int8x16_t v[2];
};
struct Ints {  // 8 x int32
  int32x4_t v[2];
};
struct Floats {  // 8 x float
  float32x4_t v[2];
};

// Four chunks of 16 bytes, halves of groups.
struct Quad {
  uint8x16_t v[4];
};
struct QuadInts {
  int32x4_t v[4];
};
struct QuadFloats {
  float32x4_t v[4];
};

LOCALDS_INLINE void store_bytes(void* p, Bytes b) {
  vst1q_s8(static_cast<int8_t*>(p), b.v[0]);
  vst1q_s8(static_cast<int8_t*>(p) + 16, b.v[1]);
}

LOCALDS_INLINE uint8x16_t load_chunk(const void* p) {
  return vld1q_u8(static_cast<const uint8_t*>(p));
}
LOCALDS_INLINE Quad load_chunks(const void* p0, const void* p1, const void* p2, const void* p3) {
  return {{load_chunk(p0), load_chunk(p1), load_chunk(p2), load_chunk(p3)}};
}
LOCALDS_INLINE Quad load_quad(const void* p) {
  const auto* from = static_cast<const uint8_t*>(p);
  return load_chunks(from, from + 16, from + 32, from + 48);
}
// One chunk in all four places; two chunks in both halves.
LOCALDS_INLINE Quad repeat_chunk(const void* p) { return load_chunks(p, p, p, p); }
LOCALDS_INLINE Quad repeat_two_chunks(const void* p) {
  const auto* second = static_cast<const uint8_t*>(p) + 16;
  return load_chunks(p, second, p, second);
}
// Eight chunks in a row: those with even numbers, those with odd ones.
LOCALDS_INLINE void load_even_odd(const uint8_t* p, Quad& even, Quad& odd) {
  even = load_chunks(p, p + 32, p + 64, p + 96);
  odd = load_chunks(p + 16, p + 48, p + 80, p + 112);
}
LOCALDS_INLINE void store_quad(void* p, Quad q) {
  for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, q.v[i]);
}

// Applies f to each chunk and its number.
template <class F>
LOCALDS_INLINE Quad each_chunk(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
LOCALDS_INLINE Quad quad_and(Quad q, int mask) {
  const uint8x16_t m = vdupq_n_u8(static_cast<uint8_t>(mask));
  return each_chunk([&](int i) { return vandq_u8(q.v[i], m); });
}
LOCALDS_INLINE Quad quad_or(Quad a, Quad b) {
  return each_chunk([&](int i) { return vorrq_u8(a.v[i], b.v[i]); });
}
LOCALDS_INLINE Quad quad_xor(Quad q, int mask) {
  const uint8x16_t m = vdupq_n_u8(static_cast<uint8_t>(mask));
  return each_chunk([&](int i) { return veorq_u8(q.v[i], m); });
}
// Shifts each chunk right by its n (left by -n).
LOCALDS_INLINE Quad quad_shift(Quad q, int n0, int n1, int n2, int n3) {
  const int n[4] = {n0, n1, n2, n3};
  return each_chunk(
      [&](int i) { return vshlq_u8(q.v[i], vdupq_n_s8(static_cast<int8_t>(-n[i]))); });
}
// Looks up nibbles in 16 bytes.
LOCALDS_INLINE Quad lookup(const int8_t* table, Quad nibbles) {
  const uint8x16_t t = load_chunk(table);
  return each_chunk([&](int i) { return vqtbl1q_u8(t, nibbles.v[i]); });
}
// Bytes that are `value` (a power of two) where a chunk's bytes have their bit b set, else 0.
LOCALDS_INLINE Quad select_bits(Quad q, int b0, int b1, int b2, int b3, int value) {
  const int b[4] = {b0, b1, b2, b3};
  return quad_and(each_chunk([&](int i) {
                    return vtstq_u8(q.v[i], vdupq_n_u8(static_cast<uint8_t>(1 << b[i])));
                  }),
                  value);
}
// Adds `value` to byte j of a chunk where bit j of the two bytes at its p is set.
LOCALDS_INLINE Quad add_bits(Quad q, const uint8_t* p0, const uint8_t* p1, const uint8_t* p2,
                             const uint8_t* p3, int value) {
  const uint8_t* p[4] = {p0, p1, p2, p3};
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  const Quad set = each_chunk(
      [&](int i) { return vtstq_u8(vcombine_u8(vld1_dup_u8(p[i]), vld1_dup_u8(p[i] + 1)), bit); });
  return quad_or(q, quad_and(set, value));
}

LOCALDS_INLINE Ints ints(int value) { return {{vdupq_n_s32(value), vdupq_n_s32(value)}}; }
// Lane i of the result is bits [shift * i, shift * i + width) of `bits`.
template <int shift, int width>
LOCALDS_INLINE Ints unpack_fields(uint32_t bits) {
  constexpr int32_t kShifts[8] = {0,          -shift,     -2 * shift, -3 * shift,
                                  -4 * shift, -5 * shift, -6 * shift, -7 * shift};
  const auto four = [&](const int32_t* shifts) {
    const uint32x4_t v = vshlq_u32(vdupq_n_u32(bits), vld1q_s32(shifts));
    return vreinterpretq_s32_u32(vandq_u32(v, vdupq_n_u32((1u << width) - 1)));
  };
  return {{four(kShifts), four(kShifts + 4)}};
}

LOCALDS_INLINE Floats floats(float value) { return {{vdupq_n_f32(value), vdupq_n_f32(value)}}; }
LOCALDS_INLINE Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4)}}; }
LOCALDS_INLINE void store(float* p, Floats a) {
  vst1q_f32(p, a.v[0]);
  vst1q_f32(p + 4, a.v[1]);
}
LOCALDS_INLINE Floats to_floats(Ints a) { return {{vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1])}}; }
LOCALDS_INLINE Floats add(Floats a, Floats b) {
  return {{vaddq_f32(a.v[0], b.v[0]), vaddq_f32(a.v[1], b.v[1])}};
}
LOCALDS_INLINE Floats subtract(Floats a, Floats b) {
  return {{vsubq_f32(a.v[0], b.v[0]), vsubq_f32(a.v[1], b.v[1])}};
}
LOCALDS_INLINE Floats multiply(Floats a, Floats b) {
  return {{vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1])}};
}
LOCALDS_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1])}};
}
LOCALDS_INLINE Floats negate(Floats a) { return {{vnegq_f32(a.v[0]), vnegq_f32(a.v[1])}}; }
LOCALDS_INLINE float horizontal_sum(Floats a) { return vaddvq_f32(vaddq_f32(a.v[0], a.v[1])); }

LOCALDS_INLINE Ints widen(uint8x8_t v) {
  const uint16x8_t wide = vmovl_u8(v);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))),
           vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(wide)))}};
}
// 8 bytes, given as an integer, to floats.
LOCALDS_INLINE Floats uint8_to_floats(uint64_t bytes) {
  return to_floats(widen(vcreate_u8(bytes)));
}
LOCALDS_INLINE Floats load_uint8(const uint8_t* p) { return to_floats(widen(vld1_u8(p))); }
LOCALDS_INLINE Floats load_int8(const uint8_t* p) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  return to_floats(Ints{{vmovl_s16(vget_low_s16(wide)), vmovl_s16(vget_high_s16(wide))}});
}
// 2^(e - 128) of eight bytes e, see e8m0_half_to_float.
LOCALDS_INLINE Floats powers_of_two(uint64_t bytes) {
  const Ints e = widen(vcreate_u8(bytes));
  const int32x4_t one = vdupq_n_s32(1);
  const auto power = [&](int32x4_t v) {
    // The second one is for e = 0 and 1, which are subnormal; it is smaller for all others.
    return vreinterpretq_f32_s32(
        vmaxq_s32(vshlq_n_s32(vsubq_s32(v, one), 23), vshlq_n_s32(vaddq_s32(v, one), 21)));
  };
  return {{power(e.v[0]), power(e.v[1])}};
}
struct Shorts {  // 16 x int16
  int16x8_t v[2];
};
// 16 bytes, given as two integers or in memory, to int16.
LOCALDS_INLINE Shorts uint8_to_shorts(uint64_t low, uint64_t high) {
  const auto eight = [](uint64_t b) { return vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(b))); };
  return {{eight(low), eight(high)}};
}
LOCALDS_INLINE Shorts load_int8_shorts(const void* p) {
  const int8x16_t v = vreinterpretq_s8_u8(load_chunk(p));
  return {{vmovl_s8(vget_low_s8(v)), vmovl_s8(vget_high_s8(v))}};
}
LOCALDS_INLINE Shorts add(Shorts s, int value) {
  const int16x8_t all = vdupq_n_s16(static_cast<int16_t>(value));
  return {{vaddq_s16(s.v[0], all), vaddq_s16(s.v[1], all)}};
}
// Products with 16 int16 of memory, neighbours added; the sums of neighbours alone.
LOCALDS_INLINE Ints dot_neighbours(Shorts s, const int16_t* p) {
  const auto eight = [](int16x8_t a, int16x8_t b) {
    return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)),
                      vmull_s16(vget_high_s16(a), vget_high_s16(b)));
  };
  return {{eight(s.v[0], vld1q_s16(p)), eight(s.v[1], vld1q_s16(p + 8))}};
}
LOCALDS_INLINE Ints sum_neighbours(const int16_t* p) {
  return {{vpaddlq_s16(vld1q_s16(p)), vpaddlq_s16(vld1q_s16(p + 8))}};
}

// The float16 at p, and the next one, in all lanes.
LOCALDS_INLINE float half_at(const uint8_t* p) {
  __fp16 h;
  std::memcpy(&h, p, 2);
  return h;
}
LOCALDS_INLINE Floats broadcast_half(const uint8_t* p) { return floats(half_at(p)); }
LOCALDS_INLINE void broadcast_two_halves(const uint8_t* p, Floats& first, Floats& second) {
  first = floats(half_at(p));
  second = floats(half_at(p + 2));
}
LOCALDS_INLINE Floats load_half(const uint8_t* p) {
  const float16x8_t v = vreinterpretq_f16_u8(vld1q_u8(p));
  return {{vcvt_f32_f16(vget_low_f16(v)), vcvt_f32_f16(vget_high_f16(v))}};
}
// 8 float16, `stride` bytes apart.
template <int stride>
LOCALDS_INLINE Floats gather_halves(const uint8_t* p) {
  uint8_t halves[16];
  for (int i = 0; i < 8; ++i) std::memcpy(halves + 2 * i, p + i * stride, 2);
  return load_half(halves);
}

// The largest magnitude of 32 floats; NaN if there is one, as its bits compare above all others.
LOCALDS_INLINE float largest_magnitude(const Floats (&f)[4]) {
  uint32x4_t largest = vdupq_n_u32(0);
  for (const Floats& eight : f) {
    for (const float32x4_t four : eight.v) {
      largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(four)));
    }
  }
  return std::bit_cast<float>(vmaxvq_u32(largest));
}
// 32 floats times `factor`, rounded to the nearest int8, ties to even.
LOCALDS_INLINE Bytes round_to_bytes(const Floats (&f)[4], Floats factor) {
  const auto eight = [&](const Floats& a) {
    const Floats scaled = multiply(a, factor);
    return vqmovn_s16(vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(scaled.v[0])),
                                   vqmovn_s32(vcvtnq_s32_f32(scaled.v[1]))));
  };
  return {{vcombine_s8(eight(f[0]), eight(f[1])), vcombine_s8(eight(f[2]), eight(f[3]))}};
}
// The sums of the first and of the last 16 signed bytes.
LOCALDS_INLINE void half_sums(Bytes b, int16_t& first, int16_t& second) {
  first = vaddlvq_s8(b.v[0]);
  second = vaddlvq_s8(b.v[1]);
}

// Fetches a cache line into the second cache, or into the first.
LOCALDS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
LOCALDS_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

// Four rows of four 32-bit units to four columns, at out, out + a, out + b and out + a + b.
LOCALDS_INLINE void transpose4(const void* r0, const void* r1, const void* r2, const void* r3,
                               uint32_t* out, int64_t a, int64_t b) {
  const auto row = [](const void* p) { return vreinterpretq_u32_u8(load_chunk(p)); };
  const auto even = [&](const void* x, const void* y) {
    return vreinterpretq_u64_u32(vtrn1q_u32(row(x), row(y)));
  };
  const auto odd = [&](const void* x, const void* y) {
    return vreinterpretq_u64_u32(vtrn2q_u32(row(x), row(y)));
  };
  const auto put = [&](uint32_t* p, uint64x2_t v) { vst1q_u32(p, vreinterpretq_u32_u64(v)); };
  put(out, vtrn1q_u64(even(r0, r1), even(r2, r3)));
  put(out + a, vtrn1q_u64(odd(r0, r1), odd(r2, r3)));
  put(out + b, vtrn2q_u64(even(r0, r1), even(r2, r3)));
  put(out + a + b, vtrn2q_u64(odd(r0, r1), odd(r2, r3)));
}

LOCALDS_INLINE int32x4_t dot16(int32x4_t acc, uint8x16_t w, int8x16_t x) {
  return vdotq_s32(acc, vreinterpretq_s8_u8(w), x);
}

// Sums of 4 adjacent products with 64 activations; of two quads with 128.
template <bool>
LOCALDS_INLINE QuadInts dot_quad(Quad w, const int8_t* x) {
  const auto one = [&](int i) { return dot16(vdupq_n_s32(0), w.v[i], vld1q_s8(x + 16 * i)); };
  return {{one(0), one(1), one(2), one(3)}};
}
template <bool wide>
LOCALDS_INLINE QuadInts dot_quads(Quad first, Quad second, const int8_t* x) {
  const QuadInts sums = dot_quad<wide>(first, x);
  const auto one = [&](int i) { return dot16(sums.v[i], second.v[i], vld1q_s8(x + 64 + 16 * i)); };
  return {{one(0), one(1), one(2), one(3)}};
}
LOCALDS_INLINE QuadFloats to_floats(QuadInts q) {
  const auto one = [&](int i) { return vcvtq_f32_s32(q.v[i]); };
  return {{one(0), one(1), one(2), one(3)}};
}
LOCALDS_INLINE QuadFloats fma(QuadFloats a, QuadFloats b, QuadFloats c) {
  const auto one = [&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); };
  return {{one(0), one(1), one(2), one(3)}};
}
LOCALDS_INLINE Floats fold(QuadFloats q) {
  return {{vaddq_f32(q.v[0], q.v[1]), vaddq_f32(q.v[2], q.v[3])}};
}

// A factor for each of eight groups, or for each of their sixteen halves. They lie in memory, as
// loading one into all lanes costs no more than a load.
struct Factors {
  float v[16];
};
LOCALDS_INLINE Factors group_factors(Floats f) {
  Factors factors;
  store(factors.v, f);
  return factors;
}
// Those of the halves, times those of their groups.
LOCALDS_INLINE Factors half_factors(Shorts halves, Floats groups) {
  Factors factors;
  for (int i = 0; i < 2; ++i) {
    const float32x4_t g = groups.v[i];
    const int16x8_t h = halves.v[i];
    const auto put = [&](float* p, int16x4_t four, float32x4_t twice) {
      vst1q_f32(p, vmulq_f32(vcvtq_f32_s32(vmovl_s16(four)), twice));
    };
    put(factors.v + 8 * i, vget_low_s16(h), vzip1q_f32(g, g));
    put(factors.v + 8 * i + 4, vget_high_s16(h), vzip2q_f32(g, g));
  }
  return factors;
}
LOCALDS_INLINE void store_halves(float* p, const Factors& f) { std::memcpy(p, f.v, 64); }
// Those of groups first, + 2, + 4, + 6, each in the four lanes of a chunk.
LOCALDS_INLINE QuadFloats spread_groups(const Factors& f, int first) {
  const auto one = [&](int i) { return vld1q_dup_f32(f.v + first + 2 * i); };
  return {{one(0), one(1), one(2), one(3)}};
}
// Those of the halves of groups 2 * i and 2 * i + 1.
LOCALDS_INLINE QuadFloats spread_halves(const Factors& f, int i) {
  const auto one = [&](int j) { return vld1q_dup_f32(f.v + 4 * i + j); };
  return {{one(0), one(1), one(2), one(3)}};
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

// acc + the sums of 4 adjacent products, for two pairs of vectors.
template <bool>
LOCALDS_INLINE Ints dot_two(Ints acc, Ints w0, Ints x0, Ints w1, Ints x1) {
  const auto one = [&](int i) {
    const auto bytes = [](int32x4_t v) { return vreinterpretq_s8_s32(v); };
    return vdotq_s32(vdotq_s32(acc.v[i], bytes(w0.v[i]), bytes(x0.v[i])), bytes(w1.v[i]),
                     bytes(x1.v[i]));
  };
  return {{one(0), one(1)}};
}

LOCALDS_INLINE WideInts load_wide_bytes(const void* p) {
  const auto* from = static_cast<const uint8_t*>(p);
  return {{vreinterpretq_s32_u8(load_chunk(from)), vreinterpretq_s32_u8(load_chunk(from + 16))}};
}
LOCALDS_INLINE WideInts broadcast4(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return ints(value);
}
// 16 bytes of each of 8 rows to four vectors with 4 bytes of every row, at out, out + a, out + b
// and out + a + b.
LOCALDS_INLINE void interleave(const uint8_t* rows, int64_t stride, uint32_t* out, int64_t a,
                               int64_t b) {
  for (int r = 0; r < kLanes; r += 4) {
    const uint8_t* p = rows + r * stride;
    transpose4(p, p + stride, p + 2 * stride, p + 3 * stride, out + r, a, b);
  }
}

LOCALDS_INLINE Wide wide(float value) { return floats(value); }
LOCALDS_INLINE Wide load_wide(const float* p) { return load(p); }
LOCALDS_INLINE void store_wide(float* p, Wide v) { store(p, v); }
// The first `count` lanes; the others read as zero and are not written.
LOCALDS_INLINE Wide load_partial(const float* p, int count) {
  float copy[kLanes] = {};
  std::memcpy(copy, p, static_cast<size_t>(count) * sizeof(float));
  return load(copy);
}
LOCALDS_INLINE void store_partial(float* p, Wide v, int count) {
  float copy[kLanes];
  store(copy, v);
  std::memcpy(p, copy, static_cast<size_t>(count) * sizeof(float));
}
LOCALDS_INLINE Wide load_wide_half(const uint8_t* p) { return load_half(p); }
LOCALDS_INLINE Wide load_wide_bfloat16(const uint8_t* p) {
  const uint16x8_t v = vreinterpretq_u16_u8(vld1q_u8(p));
  return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)),
           vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(v), 16))}};
}
LOCALDS_INLINE Wide divide(Wide a, Wide b) {
  return {{vdivq_f32(a.v[0], b.v[0]), vdivq_f32(a.v[1], b.v[1])}};
}
// The larger, the smaller; NaN if either is.
LOCALDS_INLINE Wide maximum(Wide a, Wide b) {
  return {{vmaxq_f32(a.v[0], b.v[0]), vmaxq_f32(a.v[1], b.v[1])}};
}
LOCALDS_INLINE Wide minimum(Wide a, Wide b) {
  return {{vminq_f32(a.v[0], b.v[0]), vminq_f32(a.v[1], b.v[1])}};
}
LOCALDS_INLINE Wide round_nearest(Wide a) { return {{vrndnq_f32(a.v[0]), vrndnq_f32(a.v[1])}}; }
// v * 2^n for whole n in [-252, 254], in two steps so that subnormal results are right.
LOCALDS_INLINE Wide scale_by_power(Wide v, Wide n) {
  const auto one = [&](int i) {
    const int32x4_t whole = vcvtnq_s32_f32(n.v[i]), half = vshrq_n_s32(whole, 1);
    const auto power = [](int32x4_t e) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
    };
    return vmulq_f32(vmulq_f32(v.v[i], power(half)), power(vsubq_s32(whole, half)));
  };
  return {{one(0), one(1)}};
}
// The sums of four vectors.
LOCALDS_INLINE float32x4_t horizontal_sum4(Wide a, Wide b, Wide c, Wide d) {
  const auto fold_wide = [](Wide v) { return vaddq_f32(v.v[0], v.v[1]); };
  return vpaddq_f32(vpaddq_f32(fold_wide(a), fold_wide(b)), vpaddq_f32(fold_wide(c), fold_wide(d)));
}
LOCALDS_INLINE void store4(float* p, float32x4_t v) { vst1q_f32(p, v); }

}  // namespace localds::LOCALDS_ISA
