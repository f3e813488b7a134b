// The part of the Metal Shading Language that the kernels use, on the emulator in lockstep.h.
// Stricter than C++ where Metal is: min and max take two values of one type. Address spaces are
// not told apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#define device
#define constant
#define thread
#define threadgroup

using uint = unsigned;
using ushort = unsigned short;
using half = _Float16;
using float16_t = half;

namespace metal {

using std::exp;
using std::numeric_limits;

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T, int n>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T x, T y) : x(x), y(y) {}
  template <typename U>
  explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
  vec& operator*=(T s) {
    x *= s, y *= s;
    return *this;
  }
  vec& operator+=(vec v) {
    x += v.x, y += v.y;
    return *this;
  }
};
template <typename T>
vec<T, 2> operator*(T s, vec<T, 2> v) {
  return {s * v.x, s * v.y};
}
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
};
using float2 = vec<float, 2>;
using float4 = vec<float, 4>;
using half2 = vec<half, 2>;

template <typename T>
T simd_sum(T v) {
  for (unsigned step = 16; step > 0; step /= 2) {
    v += lockstep::exchange(v, lockstep::lane() ^ step);
  }
  return v;
}

}  // namespace metal

using namespace metal;

struct uint3 {
  uint x, y, z;
};

// What the arguments of a kernel are made of.
inline uint3 three(lockstep::Index i) { return {i.x, i.y, i.z}; }
inline uint flat(lockstep::Index i) {
  return i.x + lockstep::block_size.x * (i.y + lockstep::block_size.y * i.z);
}
inline uint threads_per_group() {
  return lockstep::block_size.x * lockstep::block_size.y * lockstep::block_size.z;
}
inline uint3 position_in_grid() {
  return {lockstep::block_index.x * lockstep::block_size.x + lockstep::thread_index.x,
          lockstep::block_index.y * lockstep::block_size.y + lockstep::thread_index.y,
          lockstep::block_index.z * lockstep::block_size.z + lockstep::thread_index.z};
}
