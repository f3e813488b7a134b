// Kernels over GGUF blocks. The parts "multiply" and "convert" are bodies: MLX writes the function
// around them, with an argument for each input, output and attribute by its name. "products" goes
// into the header of "multiply", after the parts of its block type.

//// products
// Of kRows rows of a matrix, `stride` bytes apart, their products with x, in every lane of a
// simdgroup.
template <int kRows>
inline void products(const device uint8_t* w, int64_t stride, int rows, const device float* x,
                     int blocks, int lane, thread float* sums) {
  constexpr int kUnits = kElements / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0;
  for (int i = lane; i < blocks * kUnits; i += 32) {
    const int block = i / kUnits, u = i % kUnits;
    const device float4* a =
        reinterpret_cast<const device float4*>(x + block * kElements + first_of(u));
    const device float4* c =
        reinterpret_cast<const device float4*>(x + block * kElements + second_of(u));
    float4 v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = a[j];
      v[4 + j] = c[j];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Of fewer rows, the last again: without a branch, all rows are loaded at the same time.
      float y[32];
      read_unit(w + min(r, rows - 1) * stride + int64_t(block) * kBytes, u, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[r] += y[4 * j] * v[j].x + y[4 * j + 1] * v[j].y + y[4 * j + 2] * v[j].z +
                   y[4 * j + 3] * v[j].w;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = simd_sum(sums[r]);
}
//// multiply
// y[m, rows] = w[ids[m]] x[m], of w uint8 [matrices, rows, bytes], x float32 [m, width] and ids
// uint32 [m]. A simdgroup does kRows rows.
const int rows = w_shape[1], bytes = w_shape[2], width = x_shape[1];
const int lane = int(thread_index_in_simdgroup), m = int(threadgroup_position_in_grid.y);
const int row = kRows * int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup +
                            simdgroup_index_in_threadgroup);
if (row >= rows) return;
float sums[kRows];
products<kRows>(w + (int64_t(ids[m]) * rows + row) * bytes, bytes, rows - row,
                x + int64_t(m) * width, bytes / kBytes, lane, sums);
if (lane == 0) {
  for (int r = 0; r < kRows && row + r < rows; ++r) y[int64_t(m) * rows + row + r] = sums[r];
}
//// convert
// y = the values of w uint8 [rows, bytes], in the type T; a thread does one unit.
constexpr int kUnits = kElements / 32;
const int units = w_shape[0] * (w_shape[1] / kBytes) * kUnits;
const int i = int(thread_position_in_grid.x);
if (i >= units) return;
const int64_t block = i / kUnits;
const int u = i % kUnits;
float v[32];
read_unit(w + block * kBytes, u, v);
for (int run = 0; run < 2; ++run) {
  device vec<T, 4>* out = reinterpret_cast<device vec<T, 4>*>(
      y + block * kElements + (run == 0 ? first_of(u) : second_of(u)));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const thread float* four = v + 16 * run + 4 * j;
    out[j] = vec<T, 4>(T(four[0]), T(four[1]), T(four[2]), T(four[3]));
  }
}
