// Loops of multiply-adds in registers alone: the most that a core can do with these instructions.
#pragma once

#include "isa/floats.h"

namespace localds::LOCALDS_ISA {

constexpr int kPeakSums = 12;  // enough to hide the latency, few enough for every register file

// sum = body(sum, factor) for each of the sums. They start from values that the compiler cannot
// know.
template <class Sum, class Load, class Body>
LOCALDS_INLINE void peak_loop(int64_t iterations, Load load, Body body) {
  constexpr uint32_t kOne = 0x3f800000;  // as a float; smaller ones may be slow
  alignas(64) uint32_t seeds[kPeakSums][kLanes];
  for (uint32_t i = 0; i < kPeakSums; ++i) {
    for (uint32_t& seed : seeds[i]) seed = kOne + i + (static_cast<uint32_t>(iterations) & 1);
  }
  Sum sums[kPeakSums];
  for (int i = 0; i < kPeakSums; ++i) sums[i] = load(seeds[i]);
  const Sum factor = load(seeds[0]);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakSums; ++i) sums[i] = body(sums[i], factor);
  }
  std::memcpy(seeds, sums, sizeof(sums));
  __asm__ __volatile__("" : : "r"(seeds) : "memory");
}

// Both return the multiply-adds done.
inline int64_t int8_loop(int64_t iterations) {
  peak_loop<WideInts>(
      iterations, [](const uint32_t* seeds) { return load_wide_bytes(seeds); },
      // The sums are factors, too: products of constants alone would be computed once.
      [](WideInts sum, WideInts x) { return dot_two<false>(sum, sum, x, sum, x); });
  return iterations * kPeakSums * kLanes * 2 * 4;
}

inline int64_t float_loop(int64_t iterations) {
  peak_loop<Wide>(
      iterations,
      [](const uint32_t* seeds) { return load_wide(reinterpret_cast<const float*>(seeds)); },
      [](Wide sum, Wide x) { return fma(sum, x, x); });
  return iterations * kPeakSums * kLanes;
}

// Reads `bytes`, a multiple of 256, and nothing else.
inline float read_loop(const uint8_t* data, int64_t bytes) {
  constexpr int kVectors = 4;
  constexpr int64_t kSize = kLanes * sizeof(float);
  Wide sums[kVectors] = {wide(0), wide(0), wide(0), wide(0)};
  for (int64_t at = 0; at < bytes; at += kVectors * kSize) {
    for (int64_t line = 0; line < kVectors * kSize; line += 64) prefetch(data + at + line + kAhead);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[i] = add(sums[i], load_wide(reinterpret_cast<const float*>(data + at + i * kSize)));
    }
  }
  return total(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

}  // namespace localds::LOCALDS_ISA
