// The kernels as plain loops, written straight from the definitions: the oracle of the fast ones,
// and what runs on a processor for which there is none.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats.h"
#include "isa/tables.h"

namespace localds {
namespace portable {
namespace {

template <class Block>
Block load_block(const uint8_t* p) {
  Block block;
  std::memcpy(&block, p, sizeof(block));
  return block;
}

uint16_t load_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

// Nibble of element j of a 16-split of 32 elements.
int split_nibble(const uint8_t* qs, int j) { return j < 16 ? qs[j] & 15 : qs[j - 16] >> 4; }

void decode(const BlockQ4_0& b, float* out) {
  const float d = to_float(b.d);
  for (int j = 0; j < 32; ++j) out[j] = d * (split_nibble(b.qs, j) - 8);
}

void decode(const BlockQ4_1& b, float* out) {
  const float d = to_float(b.d), m = to_float(b.m);
  for (int j = 0; j < 32; ++j) out[j] = d * split_nibble(b.qs, j) + m;
}

int high_bit(const uint8_t* qh, int j) { return qh[j / 8] >> (j % 8) & 1; }

void decode(const BlockQ5_0& b, float* out) {
  const float d = to_float(b.d);
  for (int j = 0; j < 32; ++j) out[j] = d * (split_nibble(b.qs, j) + 16 * high_bit(b.qh, j) - 16);
}

void decode(const BlockQ5_1& b, float* out) {
  const float d = to_float(b.d), m = to_float(b.m);
  for (int j = 0; j < 32; ++j) out[j] = d * (split_nibble(b.qs, j) + 16 * high_bit(b.qh, j)) + m;
}

void decode(const BlockQ8_0& b, float* out) {
  const float d = to_float(b.d);
  for (int j = 0; j < 32; ++j) out[j] = d * b.qs[j];
}

void decode(const BlockIQ4_NL& b, float* out) {
  const float d = to_float(b.d);
  for (int j = 0; j < 32; ++j) out[j] = d * kIq4Values[split_nibble(b.qs, j)];
}

void decode(const BlockMXFP4& b, float* out) {
  const float d = e8m0_half_to_float(b.e);
  for (int j = 0; j < 32; ++j) out[j] = d * kFp4Doubled[split_nibble(b.qs, j)];
}

void decode(const BlockQ2_K& b, float* out) {
  const float d = to_float(b.d), dmin = to_float(b.dmin);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, j = i / 32 % 4, l = i % 32;
    const int q = b.qs[32 * half + l] >> (2 * j) & 3;
    const uint8_t scale = b.scales[i / 16];
    out[i] = d * (scale & 15) * q - dmin * (scale >> 4);
  }
}

void decode(const BlockQ3_K& b, float* out) {
  const float d = to_float(b.d);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, j = i / 32 % 4, l = i % 32, k = i / 16;
    const int low = b.scales[k % 8] >> (k < 8 ? 0 : 4) & 15;
    const int scale = (low | (b.scales[8 + k % 4] >> (2 * (k / 4)) & 3) << 4) - 32;
    const int mask = b.hmask[l] >> (4 * half + j) & 1;
    const int q = (b.qs[32 * half + l] >> (2 * j) & 3) - (mask ? 0 : 4);
    out[i] = d * scale * q;
  }
}

// Scale and min of sub-block b of Q4_K and Q5_K, 6 bits each.
void six_bit_pair(const uint8_t* s, int b, int& scale, int& min) {
  if (b < 4) {
    scale = s[b] & 63;
    min = s[b + 4] & 63;
  } else {
    scale = (s[b + 4] & 15) | s[b - 4] >> 6 << 4;
    min = s[b + 4] >> 4 | s[b] >> 6 << 4;
  }
}

void decode(const BlockQ4_K& b, float* out) {
  const float d = to_float(b.d), dmin = to_float(b.dmin);
  for (int i = 0; i < 256; ++i) {
    int scale, min;
    six_bit_pair(b.scales, i / 32, scale, min);
    const int n = b.qs[32 * (i / 64) + i % 32] >> (i / 32 % 2 ? 4 : 0) & 15;
    out[i] = d * scale * n - dmin * min;
  }
}

void decode(const BlockQ5_K& b, float* out) {
  const float d = to_float(b.d), dmin = to_float(b.dmin);
  for (int i = 0; i < 256; ++i) {
    int scale, min;
    six_bit_pair(b.scales, i / 32, scale, min);
    const int n = b.qs[32 * (i / 64) + i % 32] >> (i / 32 % 2 ? 4 : 0) & 15;
    out[i] = d * scale * (n + 16 * (b.qh[i % 32] >> (i / 32) & 1)) - dmin * min;
  }
}

void decode(const BlockQ6_K& b, float* out) {
  const float d = to_float(b.d);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, g = i / 32 % 4, l = i % 32;
    const int low = b.ql[64 * half + 32 * (g % 2) + l] >> (g < 2 ? 0 : 4) & 15;
    const int high = b.qh[32 * half + l] >> (2 * g) & 3;
    out[i] = d * b.scales[i / 16] * ((low | high << 4) - 32);
  }
}

void decode(const BlockIQ4_XS& b, float* out) {
  const float d = to_float(b.d);
  for (int g = 0; g < 8; ++g) {
    const int low = b.scales_l[g / 2] >> (g % 2 ? 4 : 0) & 15;
    const int high = load_u16(b.scales_h) >> (2 * g) & 3;
    for (int j = 0; j < 32; ++j) {
      out[32 * g + j] = d * ((low | high << 4) - 32) * kIq4Values[split_nibble(b.qs + 16 * g, j)];
    }
  }
}

template <class Block>
void decode_row(const uint8_t* row, float* out, int64_t cols, int64_t block_elements) {
  for (int64_t i = 0; i < cols; i += block_elements, row += sizeof(Block)) {
    decode(load_block<Block>(row), out + i);
  }
}

void dequantize_row(Type type, const uint8_t* row, float* out, int64_t cols) {
  switch (type) {
    case Type::F32:
      std::memcpy(out, row, static_cast<size_t>(cols) * sizeof(float));
      return;
    case Type::F16:
      for (int64_t i = 0; i < cols; ++i) out[i] = half_to_float(load_u16(row + 2 * i));
      return;
    case Type::BF16:
      for (int64_t i = 0; i < cols; ++i) out[i] = bf16_to_float(load_u16(row + 2 * i));
      return;
    case Type::Q4_0:
      return decode_row<BlockQ4_0>(row, out, cols, 32);
    case Type::Q4_1:
      return decode_row<BlockQ4_1>(row, out, cols, 32);
    case Type::Q5_0:
      return decode_row<BlockQ5_0>(row, out, cols, 32);
    case Type::Q5_1:
      return decode_row<BlockQ5_1>(row, out, cols, 32);
    case Type::Q8_0:
      return decode_row<BlockQ8_0>(row, out, cols, 32);
    case Type::IQ4_NL:
      return decode_row<BlockIQ4_NL>(row, out, cols, 32);
    case Type::MXFP4:
      return decode_row<BlockMXFP4>(row, out, cols, 32);
    case Type::Q2_K:
      return decode_row<BlockQ2_K>(row, out, cols, 256);
    case Type::Q3_K:
      return decode_row<BlockQ3_K>(row, out, cols, 256);
    case Type::Q4_K:
      return decode_row<BlockQ4_K>(row, out, cols, 256);
    case Type::Q5_K:
      return decode_row<BlockQ5_K>(row, out, cols, 256);
    case Type::Q6_K:
      return decode_row<BlockQ6_K>(row, out, cols, 256);
    case Type::IQ4_XS:
      return decode_row<BlockIQ4_XS>(row, out, cols, 256);
  }
}

void quantize_activations(const float* x, int64_t cols, int64_t padded, int8_t* q,
                          int8_t* /*arranged*/, float* scale, int16_t* sum) {
  for (int64_t g = 0; g < padded / kGroup; ++g) {
    const int64_t begin = g * kGroup, end = std::clamp(cols, begin, begin + kGroup);
    float amax = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float a = std::fabs(x[i]);
      if (a > amax || std::isnan(a)) amax = a;  // a NaN stays
    }
    const bool zero = amax < kSmallestActivation;
    const float inverse = zero ? 0 : 127 / amax;
    scale[g] = zero ? 0 : amax / 127;
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      const float scaled = i < end ? x[i] * inverse : 0;
      const float value = scaled > -127 ? std::fmin(scaled, 127.0f) : -127.0f;  // NaN gives -127
      q[i] = static_cast<int8_t>(std::nearbyint(value));
    }
  }
  for (int64_t i = 0; i < padded / kHalfGroup; ++i) {
    int total = 0;
    for (int64_t j = 0; j < kHalfGroup; ++j) total += q[i * kHalfGroup + j];
    sum[i] = static_cast<int16_t>(total);
  }
}

float dot_float(const float* w, const float* x, int64_t cols) {
  double total = 0;
  for (int64_t i = 0; i < cols; ++i) total += static_cast<double>(w[i]) * x[i];
  return static_cast<float>(total);
}

float dot_int8(const float* w, const int8_t* q, const float* scale, int64_t cols) {
  double total = 0;
  for (int64_t g = 0; g * kGroup < cols; ++g) {
    float part = 0;
    for (int64_t i = g * kGroup; i < std::min(cols, (g + 1) * kGroup); ++i) part += w[i] * q[i];
    total += static_cast<double>(part) * scale[g];
  }
  return static_cast<float>(total);
}

void multiply_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
                   const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  const bool is_float = type_info(w.type).is_float;
  float* weights = static_cast<float*>(thread_scratch(static_cast<size_t>(w.cols) * sizeof(float)));
  for (int64_t r = row0; r < row1; ++r) {
    portable::dequantize_row(w.type, w.row(batch, r), weights, w.cols);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = tokens ? tokens[i] : i;
      out[i * out_stride + r - row0] =
          is_float
              ? dot_float(weights, x.f32 + t * x.f32_stride, w.cols)
              : dot_int8(weights, x.q + t * x.q_stride, x.scale + t * x.q_stride / kGroup, w.cols);
    }
  }
}

void gemv_rows(const RowsOf& a, const RowsOf* b, int64_t row0, int64_t row1, const Activations& x,
               const int32_t* tokens, int64_t n) {
  multiply_rows(*a.w, a.batch, row0, row1, x, tokens, n, a.out, a.out_stride);
  if (b) multiply_rows(*b->w, b->batch, row0, row1, x, tokens, n, b->out, b->out_stride);
}

void gemm_nt(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = dot_float(a + i * lda, b + j * ldb, k);
  }
}

void axpy(float a, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

void gemm_nn(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t p = 0; p < k; ++p) axpy(a[i * lda + p], b + p * ldb, n, c + i * ldc);
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

float exp_sum(float* x, int64_t n, float max) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - max);
  return static_cast<float>(total);
}

void scale(float a, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= a;
}

// Twelve sums, as the loops of the other instruction sets have.
template <class Sum, class Factor>
int64_t multiply_add_loop(int64_t iterations) {
  constexpr int kSums = 12;
  Sum sums[kSums] = {};
  Factor factor = static_cast<Factor>(iterations & 1);
  for (int64_t n = 0; n < iterations; ++n) {
    __asm__ __volatile__("" : "+m"(factor));
    for (Sum& sum : sums) sum += factor * factor;
  }
  __asm__ __volatile__("" : : "r"(sums) : "memory");
  return iterations * kSums;
}

float read_loop(const uint8_t* data, int64_t bytes) {
  uint64_t sums[8] = {};
  for (int64_t at = 0; at < bytes; at += 64) {
    uint64_t words[8];
    std::memcpy(words, data + at, 64);
    for (int i = 0; i < 8; ++i) sums[i] ^= words[i];
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum ^= s;
  return static_cast<float>(sum);
}

}  // namespace
}  // namespace portable

const Kernels& portable_kernels() {
  using namespace portable;
  static constexpr Kernels table = {
      .isa = "portable",
      .quantize_activations = quantize_activations,
      .dequantize_row = portable::dequantize_row,
      .gemv_rows = gemv_rows,
      .gemm_rows = multiply_rows,
      .gemm_nt = gemm_nt,
      .gemm_nn = gemm_nn,
      .near_nt = gemm_nt,
      .near_nn = gemm_nn,
      .rms_norm = rms_norm,
      .swiglu = swiglu,
      .exp_sum = exp_sum,
      .axpy = axpy,
      .scale = scale,
      .int8_loop = multiply_add_loop<int32_t, int8_t>,
      .float_loop = multiply_add_loop<float, float>,
      .read_loop = read_loop,
  };
  return table;
}

}  // namespace localds
