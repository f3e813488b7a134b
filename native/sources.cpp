#include "sources.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "formats.h"

namespace localds {
namespace {

// Sign, 4 bits of exponent (bias 7), 3 of fraction; no infinities, and one NaN of each sign.
float e4m3_to_float(uint8_t b) {
  const uint32_t sign = (b & 0x80u) << 24, magnitude = b & 0x7fu;
  if (magnitude == 0x7fu) return std::numeric_limits<float>::quiet_NaN();
  // Shifting puts the exponent 120 too low; the product is exact and makes subnormals normal.
  const float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

using ByteTable = std::array<float, 256>;

template <class Decode>
ByteTable make_table(Decode decode) {
  ByteTable table;
  for (int b = 0; b < 256; ++b) table[static_cast<size_t>(b)] = decode(static_cast<uint8_t>(b));
  return table;
}

const ByteTable& byte_table(SourceFloat type) {
  static const ByteTable e4m3 = make_table(e4m3_to_float);
  // The upper half of a float16.
  static const ByteTable e5m2 =
      make_table([](uint8_t b) { return half_to_float(static_cast<uint16_t>(b << 8)); });
  return type == SourceFloat::F8_E4M3 ? e4m3 : e5m2;
}

template <int kBits>
void unpack_group(const uint32_t* in, int64_t begin, int64_t end, float scale, int zero,
                  float* out) {
  constexpr int kPerWord = 32 / kBits, kMask = (1 << kBits) - 1;
  int64_t c = begin;
  const auto value = [&](int64_t at) {
    const int q = static_cast<int>(in[at / kPerWord] >> (at % kPerWord * kBits)) & kMask;
    return static_cast<float>(q - zero) * scale;
  };
  for (; c < end && c % kPerWord; ++c) out[c] = value(c);
  for (; c + kPerWord <= end; c += kPerWord) {
    const uint32_t word = in[c / kPerWord];
    for (int j = 0; j < kPerWord; ++j) {
      const int q = static_cast<int>(word >> (j * kBits)) & kMask;
      out[c + j] = static_cast<float>(q - zero) * scale;
    }
  }
  for (; c < end; ++c) out[c] = value(c);
}

}  // namespace

int64_t width_of(SourceFloat type) {
  return type == SourceFloat::F16 || type == SourceFloat::BF16 ? 2 : 1;
}

void widen(SourceFloat type, const uint8_t* in, int64_t n, float* out) {
  switch (type) {
    case SourceFloat::F16:
      for (int64_t i = 0; i < n; ++i) out[i] = to_float(Half{{in[2 * i], in[2 * i + 1]}});
      return;
    case SourceFloat::BF16:
      for (int64_t i = 0; i < n; ++i) {
        out[i] = bf16_to_float(static_cast<uint16_t>(in[2 * i] | in[2 * i + 1] << 8));
      }
      return;
    case SourceFloat::F8_E4M3:
    case SourceFloat::F8_E5M2: {
      const ByteTable& table = byte_table(type);
      for (int64_t i = 0; i < n; ++i) out[i] = table[in[i]];
      return;
    }
  }
}

void widen_scaled(SourceFloat type, const uint8_t* in, int64_t n, const float* scales,
                  int64_t block, float* out) {
  const ByteTable& table = byte_table(type);
  for (int64_t begin = 0; begin < n; begin += block) {
    const float scale = *scales++;
    const int64_t end = std::min(n, begin + block);
    for (int64_t c = begin; c < end; ++c) out[c] = table[in[c]] * scale;
  }
}

void unpack(int bits, const uint32_t* in, int64_t n, const float* scales, const uint8_t* zeros,
            int64_t group, float* out) {
  for (int64_t begin = 0; begin < n; begin += group) {
    const int64_t end = std::min(n, begin + group);
    const int zero = zeros ? *zeros++ : 1 << (bits - 1);
    const float scale = *scales++;
    if (bits == 4) {
      unpack_group<4>(in, begin, end, scale, zero, out);
    } else {
      unpack_group<8>(in, begin, end, scale, zero, out);
    }
  }
}

}  // namespace localds
