// Products with few tokens: a row is read once, its groups are decoded in registers and multiplied
// with up to four tokens. Lanes run along the columns.
#pragma once

#include "isa/decoders.h"
#include "isa/tables.h"

namespace localds::LOCALDS_ISA {

// Bytes to fetch ahead of the multiplication.
constexpr int64_t kAhead = 2048;

// One token's quantized activations.
struct Token {
  const int8_t* q;
  const float* scale;
  const int16_t* sum;
};

LOCALDS_INLINE Token token_at(const Activations& x, int64_t t) {
  return {x.q + t * x.q_stride, x.scale + t * x.q_stride / kGroup,
          x.sum + t * x.q_stride / kHalfGroup};
}

// Dot products of one row with T tokens.
template <class D, int T>
class RowProduct {
 public:
  explicit LOCALDS_INLINE RowProduct(const Token* tokens) : tokens_(tokens) {
    for (int t = 0; t < T; ++t) sums_[t][0] = sums_[t][1] = offsets_[t] = floats(0);
  }

  // Multiplies the span at `bytes`, whose first element is column `col`; only its first `groups`
  // groups exist.
  LOCALDS_INLINE void add_span(const uint8_t* bytes, int64_t col, int groups = kSpan / kGroup) {
    scale(bytes, col, groups);
    if (groups == kSpan / kGroup) {
#pragma GCC unroll 8
      for (int g = 0; g < kSpan / kGroup; ++g) add_group(bytes, col, g);
    } else {
      for (int g = 0; g < groups; ++g) add_group(bytes, col, g);
    }
  }

  LOCALDS_INLINE float result(int t) const {
    const Floats sum = add(sums_[t][0], sums_[t][1]);
    // Without mins the offset of a group is -kZero times its scale.
    if constexpr (D::kMin) return horizontal_sum(add(sum, offsets_[t]));
    return horizontal_sum(fma(offsets_[t], floats(-D::kZero), sum));
  }

 private:
  LOCALDS_INLINE void scale(const uint8_t* bytes, int64_t col, int groups) {
    Floats s[2], m[2];
    D::scales(bytes, groups, s, m);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Floats xs = load(tokens_[t].scale + col / kGroup);
      for (int h = 0; h <= D::kHalves; ++h) store(scales_[t][h], multiply(s[h], xs));
      if constexpr (!D::kMin && D::kZero == 0) continue;
      const int16_t* sum = tokens_[t].sum + col / kHalfGroup;
      const Floats* offset = D::kMin ? m : s;
      const Ints first = load_int16(sum), second = load_int16(sum + kSumHalf);
      if constexpr (D::kHalves) {
        Floats total = multiply(offset[0], to_floats(first));
        total = fma(offset[1], to_floats(second), total);
        offsets_[t] = fma(total, xs, offsets_[t]);
      } else {
        offsets_[t] = fma(multiply(offset[0], to_floats(add(first, second))), xs, offsets_[t]);
      }
    }
  }

  LOCALDS_INLINE void add_group(const uint8_t* bytes, int64_t col, int g) {
    const Bytes u = D::group(bytes, g);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Bytes x = load_bytes(tokens_[t].q + col + kGroup * g);
      const Floats value = to_floats(dot<D::kWide>(Ints(), u, x));
      const Floats factor =
          D::kHalves ? two_halves(scales_[t][0][g], scales_[t][1][g]) : floats(scales_[t][0][g]);
      // Two sums in turn, to hide the latency of the additions.
      sums_[t][g % 2] = fma(value, factor, sums_[t][g % 2]);
    }
  }

  const Token* tokens_;
  Floats sums_[T][2], offsets_[T];
  alignas(32) float scales_[T][2][kSpan / kGroup];
};

template <class D, int T>
void gemv_tokens(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Token* tokens,
                 float* out, int64_t out_stride) {
  const int64_t whole = w.cols / kSpan * kSpan;
  for (int64_t r = row0; r < row1; ++r) {
    const uint8_t* bytes = w.row(batch, r);
    RowProduct<D, T> product(tokens);
    int64_t col = 0;
    for (; col < whole; col += kSpan, bytes += D::kSpanBytes) {
      for (int line = 0; line < D::kSpanBytes; line += 64) prefetch(bytes + kAhead + line);
      product.add_span(bytes, col);
    }
    if constexpr (requires { D::kBlockBytes; }) {
      if (col < w.cols) {
        product.add_span(bytes, col, static_cast<int>((w.cols - col) / kGroup));
      }
    }
    for (int t = 0; t < T; ++t) out[t * out_stride + r - row0] = product.result(t);
  }
}

template <class D>
void gemv_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
               const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < n; i += 4, out += 4 * out_stride) {
    const int64_t count = n - i < 4 ? n - i : 4;
    Token four[4];
    for (int64_t t = 0; t < count; ++t) four[t] = token_at(x, tokens ? tokens[i + t] : i + t);
    constexpr decltype(&gemv_tokens<D, 1>) kByCount[] = {gemv_tokens<D, 1>, gemv_tokens<D, 2>,
                                                         gemv_tokens<D, 3>, gemv_tokens<D, 4>};
    kByCount[count - 1](w, batch, row0, row1, four, out, out_stride);
  }
}

}  // namespace localds::LOCALDS_ISA
