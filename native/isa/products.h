// What makes a table of kernels from the decoders and products: choice by type, float matrices,
// whole rows.
#pragma once

#include "isa/floats.h"
#include "isa/gemm.h"
#include "isa/gemv.h"
#include "isa/peaks.h"

namespace localds::LOCALDS_ISA {

// body.operator()<Decoder<type>>() for a quant type.
template <class Body>
LOCALDS_INLINE void with_decoder(Type type, Body body) {
  switch (type) {
#define LOCALDS_CASE(name) \
  case Type::name:         \
    return body.template operator()<Decoder<Type::name>>();
    LOCALDS_CASE(Q4_0)
    LOCALDS_CASE(Q4_1)
    LOCALDS_CASE(Q5_0)
    LOCALDS_CASE(Q5_1)
    LOCALDS_CASE(Q8_0)
    LOCALDS_CASE(Q2_K)
    LOCALDS_CASE(Q3_K)
    LOCALDS_CASE(Q4_K)
    LOCALDS_CASE(Q5_K)
    LOCALDS_CASE(Q6_K)
    LOCALDS_CASE(IQ4_NL)
    LOCALDS_CASE(IQ4_XS)
    LOCALDS_CASE(MXFP4)
#undef LOCALDS_CASE
    case Type::F32:
    case Type::F16:
    case Type::BF16:
      break;
  }
}

inline void quantize_activations(const float* x, int64_t cols, int64_t padded, int8_t* q,
                                 int8_t* arranged, float* scale, int16_t* sum) {
  for (int64_t g = 0; g < padded / kGroup; ++g) {
    const float* from = x + g * kGroup;
    float copy[kGroup] = {};
    if (cols < (g + 1) * kGroup) {
      for (int64_t i = g * kGroup; i < cols; ++i) copy[i - g * kGroup] = x[i];
      from = copy;
    }
    const Floats v[4] = {load(from), load(from + 8), load(from + 16), load(from + 24)};
    const float amax = largest_magnitude(v);
    const bool zero = amax < kSmallestActivation;
    scale[g] = zero ? 0 : amax / 127;
    const Bytes bytes = round_to_bytes(v, floats(zero ? 0 : 127 / amax));
    store_bytes(q + g * kGroup, bytes);
    for (int half = 0; half < 2; ++half) {
      std::memcpy(arranged + arranged_offset(g, half), q + g * kGroup + half * kHalfGroup,
                  kHalfGroup);
    }
    half_sums(bytes, sum[2 * g], sum[2 * g + 1]);
  }
}

template <class D>
void dequantize_span(const uint8_t* span, int groups, float* out) {
  constexpr int kFloats = 8;
  float scales[2 * kSpanGroups], mins[2 * kSpanGroups];
  uint8_t bytes[kSpan];
  decode_scales<D>(span, groups, scales, mins);
  decode_span<D>(span, groups, bytes);
  for (int i = 0; i < groups * kGroup; i += kFloats) {
    const int group = i / kGroup, half = i / kHalfGroup % 2;
    const int factor = D::kHalves ? 2 * group + half : group;
    const uint8_t* from = bytes + chunk_offset<D>(group, half) + i % kHalfGroup;
    const Floats u = D::kWide && !kWideUnsigned ? load_int8(from) : load_uint8(from);
    if constexpr (D::kMin) {
      store(out + i, fma(u, floats(scales[factor]), floats(mins[factor])));
    } else {
      store(out + i, multiply(subtract(u, floats(D::kZero)), floats(scales[factor])));
    }
  }
}

inline void convert_row(Type type, const uint8_t* row, float* out, int64_t cols) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    prefetch(row + 2 * i + kAhead);
    store_wide(out + i,
               type == Type::F16 ? load_wide_half(row + 2 * i) : load_wide_bfloat16(row + 2 * i));
  }
  for (; i < cols; ++i) {
    const auto bits = static_cast<uint16_t>(row[2 * i] | row[2 * i + 1] << 8);
    out[i] = type == Type::F16 ? half_to_float(bits) : bf16_to_float(bits);
  }
}

inline void dequantize_row(Type type, const uint8_t* row, float* out, int64_t cols) {
  if (type == Type::F32) {
    std::memcpy(out, row, static_cast<size_t>(cols) * sizeof(float));
  } else if (type == Type::F16 || type == Type::BF16) {
    convert_row(type, row, out, cols);
  } else {
    with_decoder(type, [&]<class D>() {
      for (int64_t col = 0; col < cols; col += kSpan, row += D::kSpanBytes) {
        const int64_t rest = cols - col;
        dequantize_span<D>(row, static_cast<int>((rest < kSpan ? rest : kSpan) / kGroup),
                           out + col);
      }
    });
  }
}

// Rows [row0, row1) of a float matrix, stored as Row says, at `rows`.
template <class Row>
void float_rows(const uint8_t* rows, int64_t row_bytes, int64_t n_rows, const Activations& x,
                const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < n; i += kNtRows) {
    const float* left[kNtRows];
    const int count = n - i < kNtRows ? static_cast<int>(n - i) : kNtRows;
    for (int j = 0; j < count; ++j) {
      left[j] = x.f32 + (tokens ? tokens[i + j] : i + j) * x.f32_stride;
    }
    nt_rows<Row>(count, left, n_rows, rows, row_bytes, x.cols, out + i * out_stride, out_stride);
  }
}

inline void multiply_floats(const Matrix& w, int64_t batch, int64_t row0, int64_t row1,
                            const Activations& x, const int32_t* tokens, int64_t n, float* out,
                            int64_t out_stride) {
  const uint8_t* rows = w.row(batch, row0);
  if (n <= kNtRows) {
    const auto multiply = w.type == Type::F32   ? float_rows<Float32Row>
                          : w.type == Type::F16 ? float_rows<Float16Row>
                                                : float_rows<Bfloat16Row>;
    return multiply(rows, w.row_bytes, row1 - row0, x, tokens, n, out, out_stride);
  }
  // As many rows as the second cache holds are converted once for all tokens.
  constexpr int64_t kBlock = 32;
  auto* converted =
      static_cast<float*>(thread_scratch(static_cast<size_t>(kBlock * w.cols) * sizeof(float)));
  for (int64_t r = row0; r < row1; r += kBlock) {
    const int64_t count = row1 - r < kBlock ? row1 - r : kBlock;
    for (int64_t i = 0; i < count; ++i) {
      LOCALDS_ISA::dequantize_row(w.type, w.row(batch, r + i), converted + i * w.cols, w.cols);
    }
    float_rows<CachedFloats>(reinterpret_cast<const uint8_t*>(converted),
                             w.cols * static_cast<int64_t>(sizeof(float)), count, x, tokens, n,
                             out + r - row0, out_stride);
  }
}

inline void any_gemv_rows(const RowsOf& a, const RowsOf* b, int64_t row0, int64_t row1,
                          const Activations& x, const int32_t* tokens, int64_t n) {
  if (type_info(a.w->type).is_float) {
    multiply_floats(*a.w, a.batch, row0, row1, x, tokens, n, a.out, a.out_stride);
    if (b) multiply_floats(*b->w, b->batch, row0, row1, x, tokens, n, b->out, b->out_stride);
    return;
  }
  with_decoder(a.w->type, [&]<class D>() { gemv_rows<D>(a, b, row0, row1, x, tokens, n); });
}

inline void any_gemm_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1,
                          const Activations& x, const int32_t* tokens, int64_t n, float* out,
                          int64_t out_stride) {
  if (type_info(w.type).is_float) {
    return multiply_floats(w, batch, row0, row1, x, tokens, n, out, out_stride);
  }
  with_decoder(w.type, [&]<class D>() {
    gemm_rows<D>(w, batch, row0, row1, x, tokens, n, out, out_stride);
  });
}

constexpr Kernels make_kernels(const char* isa) {
  return {
      .isa = isa,
      .quantize_activations = quantize_activations,
      .dequantize_row = dequantize_row,
      .gemv_rows = any_gemv_rows,
      .gemm_rows = any_gemm_rows,
      .gemm_nt = gemm_nt,
      .gemm_nn = gemm_nn,
      .near_nt = gemm_nt,
      .near_nn = gemm_nn,
      .rms_norm = rms_norm,
      .swiglu = swiglu,
      .exp_sum = exp_sum,
      .axpy = axpy,
      .scale = scale,
      .int8_loop = int8_loop,
      .float_loop = float_loop,
      .read_loop = read_loop,
  };
}

}  // namespace localds::LOCALDS_ISA
