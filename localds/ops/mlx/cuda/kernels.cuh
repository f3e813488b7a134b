// Kernels over GGUF blocks, and the choice of experts, compiled without any header. A kernel gets
// the parts "device" and "numbers", its constants (kRows and so on, and the type T), for blocks
// those of its type and "dot", and its own part. half_t is a float16's bits; MLX passes no floats
// by value, so that they come as bits, too. w is uint8 [matrices, n, bytes] (n rows of `bytes`
// bytes), x float32 [m, width], ids uint32 [m].

//// device
using uint8_t = unsigned char;
using int8_t = signed char;
using half_t = unsigned short;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using int32_t = int;
using int64_t = long long;
using uint64_t = unsigned long long;
__device__ inline float widen(half_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ inline float widen(float f) { return f; }
template <typename T>
__device__ inline T narrow(float f) {
  if constexpr (sizeof(T) == 4) {
    return f;
  } else {
    half_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
  }
}
//// numbers
__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }
__device__ inline float all_sum(float v) {
  for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(~0u, v, s);
  return v;
}
__device__ inline float all_max(float v) {
  for (int s = 16; s > 0; s /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, s));
  return v;
}
//// dot
// Of kRows rows of a matrix, their products with x, in every lane of a warp. Rows are `stride`
// bytes apart.
template <int kRows>
__device__ inline void dot(const uint8_t* w, int64_t stride, int rows, const float* x, int blocks,
                           float* sums) {
  constexpr int kUnits = kElements / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0;
  for (int i = threadIdx.x % 32; i < blocks * kUnits; i += 32) {
    const int block = i / kUnits, u = i % kUnits;
    const float4* a = reinterpret_cast<const float4*>(x + block * kElements + first(u));
    const float4* c = reinterpret_cast<const float4*>(x + block * kElements + second(u));
    float4 v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = a[j], v[4 + j] = c[j];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Of fewer rows, the last again: without a branch, all rows are loaded at the same time.
      float y[32];
      read(w + min(r, rows - 1) * stride + static_cast<int64_t>(block) * kBytes, u, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[r] += y[4 * j] * v[j].x + y[4 * j + 1] * v[j].y + y[4 * j + 2] * v[j].z +
                   y[4 * j + 3] * v[j].w;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = all_sum(sums[r]);
}
//// multiply
// y[m, rows] = w[ids[m]] x[m]. One warp does kRows rows.
extern "C" __global__ void multiply(const uint8_t* w, const float* x, const uint32_t* ids, float* y,
                                    int n, int bytes, int width) {
  const int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * kRows;
  if (row >= n) return;
  const int m = blockIdx.y;
  float sums[kRows];
  dot<kRows>(w + (static_cast<int64_t>(ids[m]) * n + row) * bytes, bytes, n - row,
             x + static_cast<int64_t>(m) * width, bytes / kBytes, sums);
  if (threadIdx.x % 32 == 0) {
    for (int r = 0; r < kRows && row + r < n; ++r)
      y[static_cast<int64_t>(m) * n + row + r] = sums[r];
  }
}
//// gated
// y[m, rows] = silu(w[ids[m]] x[m]) * (up[ids[m]] x[m]), both of one type.
extern "C" __global__ void gated(const uint8_t* w, const uint8_t* up, const float* x,
                                 const uint32_t* ids, float* y, int n, int bytes, int width) {
  const int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * kRows;
  if (row >= n) return;
  const int m = blockIdx.y;
  const int64_t at = (static_cast<int64_t>(ids[m]) * n + row) * bytes;
  const float* xm = x + static_cast<int64_t>(m / kPerToken) * width;
  float gates[kRows], ups[kRows];
  dot<kRows>(w + at, bytes, n - row, xm, bytes / kBytes, gates);
  dot<kRows>(up + at, bytes, n - row, xm, bytes / kBytes, ups);
  if (threadIdx.x % 32 == 0) {
    for (int r = 0; r < kRows && row + r < n; ++r) {
      y[static_cast<int64_t>(m) * n + row + r] = gates[r] / (1 + __expf(-gates[r])) * ups[r];
    }
  }
}
//// combined
// y[t, rows] = residual[t] + sum over k of weights[t, k] * w[ids[t, k]] x[t, k], in the order of k.
// A warp does one row of one token's kPerToken matrices.
extern "C" __global__ void combined(const uint8_t* w, const float* residual, const float* x,
                                    const uint32_t* ids, const float* weights, float* y, int n,
                                    int bytes, int width) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= n) return;
  const int t = blockIdx.y;
  float total = 0;
  for (int k = 0; k < kPerToken; ++k) {
    const int64_t m = static_cast<int64_t>(t) * kPerToken + k;
    float sum;
    dot<1>(w + (static_cast<int64_t>(ids[m]) * n + row) * bytes, bytes, 1, x + m * width,
           bytes / kBytes, &sum);
    total += weights[m] * sum;
  }
  const int64_t at = static_cast<int64_t>(t) * n + row;
  if (threadIdx.x % 32 == 0) y[at] = residual[at] + total;
}
//// convert
// y = the values of w, `units` times 32 of them; a thread does one unit.
extern "C" __global__ void convert(const uint8_t* w, T* y, int units) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= units) return;
  constexpr int kUnits = kElements / 32;
  const int64_t block = i / kUnits;
  const int u = i % kUnits;
  float v[32];
  read(w + block * kBytes, u, v);
  // 16 bytes at a time.
  constexpr int kStored = 16 / sizeof(T);
  struct alignas(16) Stored {
    T values[kStored];
  };
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    Stored* out = reinterpret_cast<Stored*>(y + block * kElements + (run ? second(u) : first(u)));
#pragma unroll
    for (int j = 0; j < 16 / kStored; ++j) {
      Stored s;
#pragma unroll
      for (int k = 0; k < kStored; ++k) s.values[k] = narrow<T>(v[16 * run + kStored * j + k]);
      out[j] = s;
    }
  }
}
//// route
// Chooses experts as `choose_experts` does. One warp a token; kExperts scores in shared memory.
extern "C" __global__ void route(const float* logits, const float* bias, uint32_t* ids,
                                 float* weights, int scale_bits) {
  __shared__ float scores[kExperts], choice[kExperts];
  const float scale = __int_as_float(scale_bits);
  const int lane = threadIdx.x, t = blockIdx.x;
  const float* in = logits + static_cast<int64_t>(t) * kExperts;
  float top = minus_infinity(), sum = 0;
  if (kGating == 0) {
    for (int e = lane; e < kExperts; e += 32) top = fmaxf(top, in[e]);
    top = all_max(top);
    for (int e = lane; e < kExperts; e += 32) sum += scores[e] = expf(in[e] - top);
    sum = all_sum(sum);
  }
  for (int e = lane; e < kExperts; e += 32) {
    if (kGating == 0) scores[e] /= sum;
    if (kGating == 1) scores[e] = 1 / (1 + expf(-in[e]));
    if (kGating == 2) scores[e] = in[e];
    const float c = scores[e] + bias[e];
    choice[e] = isnan(c) ? minus_infinity() : c;
  }
  __syncwarp();
  if (kGroups > 1) {
    constexpr int kSize = kExperts / kGroups;
    float mine = minus_infinity();
    if (lane < kGroups) {
      float best = minus_infinity(), second = minus_infinity();
      for (int i = 0; i < kSize; ++i) {
        const float c = choice[lane * kSize + i];
        if (c > best)
          second = best, best = c;
        else
          second = fmaxf(second, c);
      }
      mine = kGroupMax || kSize < 2 ? best : best + second;
    }
    int better = 0;
    for (int g = 0; g < kGroups; ++g) {
      const float other = __shfl_sync(~0u, mine, g);
      better += other > mine || (other == mine && g < lane);
    }
    if (lane < kGroups && better >= kGroupsUsed) {
      for (int i = 0; i < kSize; ++i) choice[lane * kSize + i] = minus_infinity();
    }
    __syncwarp();
  }
  // An expert that was chosen becomes NaN, which is larger than any number.
  float chosen = 0;
  for (int k = 0; k < kTop; ++k) {
    float best = minus_infinity();
    int id = kExperts;
    for (int e = lane; e < kExperts; e += 32) {
      if (choice[e] > best || (choice[e] == best && e < id)) best = choice[e], id = e;
    }
    for (int s = 16; s > 0; s /= 2) {
      const float other = __shfl_xor_sync(~0u, best, s);
      const int other_id = __shfl_xor_sync(~0u, id, s);
      if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
    if (lane == k) chosen = scores[id], ids[t * kTop + k] = id;
    if (lane == 0) choice[id] = __int_as_float(0x7fffffff);
    __syncwarp();
  }
  if (kGating == 2) {
    const float highest = all_max(lane < kTop ? chosen : minus_infinity());
    chosen = lane < kTop ? expf(chosen - highest) : 0;
    chosen /= all_sum(chosen);
  }
  if (kNormalize) chosen /= all_sum(chosen) + 1e-20f;
  if (lane < kTop) weights[t * kTop + lane] = chosen * scale;
}
