// GGUF blocks on Metal. A kernel's header gets the part "all" and that of its own block type, which
// says how 32 values of a block are read: a unit, two runs of 16 neighbouring values.
//
//   kElements, kBytes           values and bytes of a block
//   first_of(u), second_of(u)   where the two runs of unit u begin in the block
//   read_unit(b, u, w)          the values of unit u of block b, first run first

//// all
inline float half_at(const device uint8_t* p) {
  return float(*reinterpret_cast<const device half*>(p));
}
// 16 bytes at p, as 4 words: p lies at a multiple of 4, or of 2.
inline void load_by_4(const device uint8_t* p, thread uint* words) {
  const device uint* q = reinterpret_cast<const device uint*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = q[i];
}
inline void load_by_2(const device uint8_t* p, thread uint* words) {
  const device ushort* q = reinterpret_cast<const device ushort*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = uint(q[2 * i]) | uint(q[2 * i + 1]) << 16;
}
inline int byte_of(const thread uint* words, int i) {
  return int(words[i / 4] >> (8 * (i % 4)) & 255u);
}
// What the indices of IQ4_NL and IQ4_XS stand for.
constant float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
//// Q2_K
static constant constexpr int kElements = 256;
static constant constexpr int kBytes = 84;
inline int first_of(int u) { return 128 * (u / 4) + 64 * (u % 4 / 2) + 16 * (u % 2); }
inline int second_of(int u) { return first_of(u) + 32; }
inline void read_unit(const device uint8_t* b, int u, thread float* w) {
  const float d = half_at(b + 80), m = half_at(b + 82);
  const int group = first_of(u) / 16;
  const int s0 = b[group], s1 = b[group + 2];
  const float d0 = d * float(s0 & 15), m0 = m * float(s0 >> 4);
  const float d1 = d * float(s1 & 15), m1 = m * float(s1 >> 4);
  const int shift = 4 * (u % 4 / 2);
  uint q[4];
  load_by_4(b + 16 + 32 * (u / 4) + 16 * (u % 2), q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int v = byte_of(q, i) >> shift;
    w[i] = d0 * float(v & 3) - m0;
    w[16 + i] = d1 * float(v >> 2 & 3) - m1;
  }
}
//// Q3_K
static constant constexpr int kElements = 256;
static constant constexpr int kBytes = 110;
inline int first_of(int u) { return 128 * (u / 4) + 64 * (u % 4 / 2) + 16 * (u % 2); }
inline int second_of(int u) { return first_of(u) + 32; }
// Scale i of the 16 in the 12 bytes at s.
inline float scale_of(const device uint8_t* s, int i) {
  const int low = i < 8 ? int(s[i]) & 15 : int(s[i - 8]) >> 4;
  const int high = int(s[8 + i % 4]) >> (2 * (i / 4)) & 3;
  return float((low | high << 4) - 32);
}
inline void read_unit(const device uint8_t* b, int u, thread float* w) {
  const float d = half_at(b + 108);
  const int group = first_of(u) / 16;
  const float d0 = d * scale_of(b + 96, group), d1 = d * scale_of(b + 96, group + 2);
  const int shift = 4 * (u % 4 / 2);
  const int bit = 4 * (u / 4) + 2 * (u % 4 / 2);
  uint q[4], h[4];
  load_by_2(b + 32 + 32 * (u / 4) + 16 * (u % 2), q);
  load_by_2(b + 16 * (u % 2), h);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int v = byte_of(q, i) >> shift, high = byte_of(h, i) >> bit;
    w[i] = d0 * float(((v & 3) | (high & 1) << 2) - 4);
    w[16 + i] = d1 * float(((v >> 2 & 3) | (high >> 1 & 1) << 2) - 4);
  }
}
//// Q6_K
static constant constexpr int kElements = 256;
static constant constexpr int kBytes = 210;
inline int first_of(int u) { return 128 * (u / 4) + 16 * (u % 4); }
inline int second_of(int u) { return first_of(u) + 64; }
inline void read_unit(const device uint8_t* b, int u, thread float* w) {
  const float d = half_at(b + 208);
  const device int8_t* scales = reinterpret_cast<const device int8_t*>(b + 192) + first_of(u) / 16;
  const float d0 = d * float(scales[0]), d1 = d * float(scales[4]);
  const int shift = 2 * (u % 4 / 2);
  uint q[4], h[4];
  load_by_2(b + 16 * u, q);
  load_by_2(b + 128 + 32 * (u / 4) + 16 * (u % 2), h);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int v = byte_of(q, i), high = byte_of(h, i) >> shift;
    w[i] = d0 * float(((v & 15) | (high & 3) << 4) - 32);
    w[16 + i] = d1 * float((v >> 4 | (high >> 4 & 3) << 4) - 32);
  }
}
//// IQ4_NL
static constant constexpr int kElements = 32;
static constant constexpr int kBytes = 18;
inline int first_of(int) { return 0; }
inline int second_of(int) { return 16; }
inline void read_unit(const device uint8_t* b, int, thread float* w) {
  const float d = half_at(b);
  uint q[4];
  load_by_2(b + 2, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int v = byte_of(q, i);
    w[i] = d * kIq4Values[v & 15];
    w[16 + i] = d * kIq4Values[v >> 4];
  }
}
//// IQ4_XS
static constant constexpr int kElements = 256;
static constant constexpr int kBytes = 136;
inline int first_of(int u) { return 32 * u; }
inline int second_of(int u) { return 32 * u + 16; }
inline void read_unit(const device uint8_t* b, int u, thread float* w) {
  const int low = int(b[4 + u / 2]) >> (4 * (u % 2)) & 15;
  const int high = int(b[2 + u / 4]) >> (2 * (u % 4)) & 3;
  const float d = half_at(b) * float((low | high << 4) - 32);
  uint q[4];
  load_by_4(b + 8 + 16 * u, q);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int v = byte_of(q, i);
    w[i] = d * kIq4Values[v & 15];
    w[16 + i] = d * kIq4Values[v >> 4];
  }
}
