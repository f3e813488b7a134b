// CUDA, as far as the kernels use it, on the emulator of lockstep.h.
#pragma once

#define __device__
#define __global__
#define __constant__ static const
#define __shared__ static

#define threadIdx lockstep::thread_index
#define blockIdx lockstep::block_index
#define blockDim lockstep::block_size
#define gridDim lockstep::grid_size

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline float fabsf(float a) { return __builtin_fabsf(a); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float expf(float a) { return __builtin_expf(a); }
inline float __expf(float a) { return __builtin_expf(a); }
inline float roundf(float a) { return __builtin_roundf(a); }
inline float rsqrtf(float a) { return 1 / __builtin_sqrtf(a); }
inline bool isnan(float a) { return __builtin_isnan(a); }
inline float __int_as_float(int a) { return __builtin_bit_cast(float, a); }
inline float __uint_as_float(unsigned a) { return __builtin_bit_cast(float, a); }
// Of 8 bytes in two words, the four that the lowest hexadecimal digits of `select` name.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= (bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return found;
}

// Of two instructions that the kernels write themselves.
inline float half_to_float(unsigned short h) { return __builtin_bit_cast(_Float16, h); }
inline unsigned short float_to_half(float f) {
  return __builtin_bit_cast(unsigned short, static_cast<_Float16>(f));
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return lockstep::exchange(value, lockstep::lane() ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return lockstep::exchange(value, from);
}
inline void __syncwarp() { lockstep::warp_barrier(); }
