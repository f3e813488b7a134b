// GGUF blocks on CUDA. Of this file a kernel gets the part "all" and that of its own block type,
// which says how 32 values of a block are read: a unit, two runs of 16 neighbouring values.
//
//   kElements, kBytes   values and bytes of a block
//   first(u), second(u) where the two runs of unit u begin in the block
//   read(b, u, w)       the values of unit u of block b, first run first

//// all
__device__ inline float half_at(const uint8_t* p) {
  return widen(*reinterpret_cast<const half_t*>(p));
}
// kWords words at p, which lies at a multiple of kAlign.
template <int kAlign, int kWords>
__device__ inline void load(const uint8_t* p, uint32_t* words) {
  if constexpr (kAlign == 16) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(p + 4 * i);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else if constexpr (kAlign == 4) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(p)[i];
  } else if constexpr (kAlign == 2) {
    // From the aligned words that they lie in, two bytes each where p is between two of these.
    // Where it is not, the last is loaded twice: the next may be past the matrix.
    const int between = static_cast<int>(reinterpret_cast<uint64_t>(p) & 2);
    const uint32_t* aligned = reinterpret_cast<const uint32_t*>(p - between);
    const uint32_t bytes = between ? 0x5432 : 0x3210;
    uint32_t low = aligned[0];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t high = aligned[i + 1 < kWords ? i + 1 : kWords - 1 + between / 2];
      words[i] = __byte_perm(low, high, bytes);
      low = high;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = p[4 * i] | p[4 * i + 1] << 8 | p[4 * i + 2] << 16 |
                 static_cast<uint32_t>(p[4 * i + 3]) << 24;
  }
}
__device__ inline uint32_t byte_of(const uint32_t* words, int i) {
  return words[i / 4] >> (8 * (i % 4)) & 255;
}
// Scale and minimum of sub-block s of Q4_K or Q5_K, from the 12 bytes at p.
__device__ inline float2 six_bits(const uint8_t* p, int s) {
  if (s < 4) return {static_cast<float>(p[s] & 63), static_cast<float>(p[s + 4] & 63)};
  return {static_cast<float>(p[s + 4] & 15 | (p[s - 4] >> 6) << 4),
          static_cast<float>(p[s + 4] >> 4 | (p[s] >> 6) << 4)};
}
// What the indices of IQ4_NL and IQ4_XS stand for.
__constant__ float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};
//// Q4_0
constexpr int kElements = 32, kBytes = 18;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  const float d = half_at(b);
  uint32_t q[4];
  load<2, 4>(b + 2, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * (static_cast<int>(v & 15) - 8);
    w[16 + i] = d * (static_cast<int>(v >> 4) - 8);
  }
}
//// Q4_1
constexpr int kElements = 32, kBytes = 20;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  const float d = half_at(b), m = half_at(b + 2);
  uint32_t q[4];
  load<4, 4>(b + 4, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * (v & 15) + m;
    w[16 + i] = d * (v >> 4) + m;
  }
}
//// Q5_0
constexpr int kElements = 32, kBytes = 22;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  const float d = half_at(b);
  uint32_t words[5];
  load<2, 5>(b + 2, words);
  const uint32_t high = words[0], *q = words + 1;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * (static_cast<int>(v & 15 | (high >> i & 1) << 4) - 16);
    w[16 + i] = d * (static_cast<int>(v >> 4 | (high >> (16 + i) & 1) << 4) - 16);
  }
}
//// Q5_1
constexpr int kElements = 32, kBytes = 24;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  const float d = half_at(b), m = half_at(b + 2);
  const uint32_t high = *reinterpret_cast<const uint32_t*>(b + 4);
  uint32_t q[4];
  load<4, 4>(b + 8, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * (v & 15 | (high >> i & 1) << 4) + m;
    w[16 + i] = d * (v >> 4 | (high >> (16 + i) & 1) << 4) + m;
  }
}
//// Q8_0
constexpr int kElements = 32, kBytes = 34;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  const float d = half_at(b);
  uint32_t q[8];
  load<2, 8>(b + 2, q);
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i] = d * static_cast<int8_t>(byte_of(q, i));
}
//// Q2_K
constexpr int kElements = 256, kBytes = 84;
__device__ inline int first(int u) { return 128 * (u / 4) + 64 * (u % 4 / 2) + 16 * (u % 2); }
__device__ inline int second(int u) { return first(u) + 32; }
__device__ inline void read(const uint8_t* b, int u, float* w) {
  const float d = half_at(b + 80), m = half_at(b + 82);
  const uint8_t* scales = b + first(u) / 16;
  const float d0 = d * (scales[0] & 15), m0 = m * (scales[0] >> 4);
  const float d1 = d * (scales[2] & 15), m1 = m * (scales[2] >> 4);
  const int shift = 4 * (u % 4 / 2);
  uint32_t q[4];
  load<4, 4>(b + 16 + 32 * (u / 4) + 16 * (u % 2), q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i) >> shift;
    w[i] = d0 * (v & 3) - m0;
    w[16 + i] = d1 * (v >> 2 & 3) - m1;
  }
}
//// Q3_K
constexpr int kElements = 256, kBytes = 110;
__device__ inline int first(int u) { return 128 * (u / 4) + 64 * (u % 4 / 2) + 16 * (u % 2); }
__device__ inline int second(int u) { return first(u) + 32; }
__device__ inline float scale_at(const uint8_t* s, int i) {
  const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
  return static_cast<float>((low | (s[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32);
}
__device__ inline void read(const uint8_t* b, int u, float* w) {
  const float d = half_at(b + 108);
  const int group = first(u) / 16;
  const float d0 = d * scale_at(b + 96, group), d1 = d * scale_at(b + 96, group + 2);
  const int shift = 4 * (u % 4 / 2);
  const int bit = 4 * (u / 4) + 2 * (u % 4 / 2);
  uint32_t q[4], h[4];
  load<2, 4>(b + 32 + 32 * (u / 4) + 16 * (u % 2), q);
  load<2, 4>(b + 16 * (u % 2), h);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i) >> shift, high = byte_of(h, i) >> bit;
    w[i] = d0 * (static_cast<int>(v & 3 | (high & 1) << 2) - 4);
    w[16 + i] = d1 * (static_cast<int>(v >> 2 & 3 | (high >> 1 & 1) << 2) - 4);
  }
}
//// Q4_K
constexpr int kElements = 256, kBytes = 144;
__device__ inline int first(int u) { return 64 * (u / 2) + 16 * (u % 2); }
__device__ inline int second(int u) { return first(u) + 32; }
__device__ inline void read(const uint8_t* b, int u, float* w) {
  const float d = half_at(b), m = half_at(b + 2);
  const float2 s0 = six_bits(b + 4, u / 2 * 2), s1 = six_bits(b + 4, u / 2 * 2 + 1);
  const float d0 = d * s0.x, m0 = m * s0.y, d1 = d * s1.x, m1 = m * s1.y;
  uint32_t q[4];
  load<16, 4>(b + 16 + 16 * u, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d0 * (v & 15) - m0;
    w[16 + i] = d1 * (v >> 4) - m1;
  }
}
//// Q5_K
constexpr int kElements = 256, kBytes = 176;
__device__ inline int first(int u) { return 64 * (u / 2) + 16 * (u % 2); }
__device__ inline int second(int u) { return first(u) + 32; }
__device__ inline void read(const uint8_t* b, int u, float* w) {
  const float d = half_at(b), m = half_at(b + 2);
  const int bit = u / 2 * 2;
  const float2 s0 = six_bits(b + 4, bit), s1 = six_bits(b + 4, bit + 1);
  const float d0 = d * s0.x, m0 = m * s0.y, d1 = d * s1.x, m1 = m * s1.y;
  uint32_t q[4], h[4];
  load<16, 4>(b + 48 + 16 * u, q);
  load<16, 4>(b + 16 + 16 * (u % 2), h);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i), high = byte_of(h, i) >> bit;
    w[i] = d0 * (v & 15 | (high & 1) << 4) - m0;
    w[16 + i] = d1 * (v >> 4 | (high >> 1 & 1) << 4) - m1;
  }
}
//// Q6_K
constexpr int kElements = 256, kBytes = 210;
__device__ inline int first(int u) { return 128 * (u / 4) + 16 * (u % 4); }
__device__ inline int second(int u) { return first(u) + 64; }
__device__ inline void read(const uint8_t* b, int u, float* w) {
  const float d = half_at(b + 208);
  const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192) + first(u) / 16;
  const float d0 = d * scales[0], d1 = d * scales[4];
  const int shift = 2 * (u % 4 / 2);
  uint32_t q[4], h[4];
  load<2, 4>(b + 16 * u, q);
  load<2, 4>(b + 128 + 32 * (u / 4) + 16 * (u % 2), h);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i), high = byte_of(h, i) >> shift;
    w[i] = d0 * (static_cast<int>(v & 15 | (high & 3) << 4) - 32);
    w[16 + i] = d1 * (static_cast<int>(v >> 4 | (high >> 4 & 3) << 4) - 32);
  }
}
//// IQ4_NL
constexpr int kElements = 32, kBytes = 18;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  const float d = half_at(b);
  uint32_t q[4];
  load<2, 4>(b + 2, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * kIq4Values[v & 15];
    w[16 + i] = d * kIq4Values[v >> 4];
  }
}
//// IQ4_XS
constexpr int kElements = 256, kBytes = 136;
__device__ inline int first(int u) { return 32 * u; }
__device__ inline int second(int u) { return 32 * u + 16; }
__device__ inline void read(const uint8_t* b, int u, float* w) {
  const int low = b[4 + u / 2] >> (4 * (u % 2)) & 15;
  const int high = b[2 + u / 4] >> (2 * (u % 4)) & 3;
  const float d = half_at(b) * ((low | high << 4) - 32);
  uint32_t q[4];
  load<4, 4>(b + 8 + 16 * u, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * kIq4Values[v & 15];
    w[16 + i] = d * kIq4Values[v >> 4];
  }
}
//// MXFP4
constexpr int kElements = 32, kBytes = 17;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__constant__ float kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
__device__ inline void read(const uint8_t* b, int, float* w) {
  const uint32_t e = b[0];
  const float d = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  uint32_t q[4];
  load<1, 4>(b + 1, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = byte_of(q, i);
    w[i] = d * kValues[v & 15];
    w[16 + i] = d * kValues[v >> 4];
  }
}
//// F32
constexpr int kElements = 32, kBytes = 128;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i] = reinterpret_cast<const float*>(b)[i];
}
//// F16
constexpr int kElements = 32, kBytes = 64;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  uint32_t q[16];
  load<16, 16>(b, q);
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i] = half_at(reinterpret_cast<const uint8_t*>(q) + 2 * i);
}
//// BF16
constexpr int kElements = 32, kBytes = 64;
__device__ inline int first(int) { return 0; }
__device__ inline int second(int) { return 16; }
__device__ inline void read(const uint8_t* b, int, float* w) {
  uint32_t q[16];
  load<16, 16>(b, q);
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i] = __uint_as_float((q[i / 2] >> (16 * (i % 2))) << 16);
}
