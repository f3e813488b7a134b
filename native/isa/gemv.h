// Products with few tokens: a row is read once, its groups are decoded in registers and multiplied
// with up to four tokens. Lanes run along the columns.
#pragma once

#include "isa/decoders.h"
#include "isa/tables.h"

namespace localds::LOCALDS_ISA {

// One token's quantized activations.
struct Token {
  const int8_t* q;
  const float* scale;
  const int16_t* sum;
};

// Token t of x, with its bytes in the order of `q`: x.q or x.arranged.
LOCALDS_INLINE Token token_at(const Activations& x, const int8_t* q, int64_t t) {
  return {q + t * x.q_stride, x.scale + t * x.q_stride / kGroup,
          x.sum + t * x.q_stride / kHalfGroup};
}

// Dot products of one row with T tokens.
template <class D, int T>
class RowProduct {
 public:
  LOCALDS_INLINE RowProduct() {
    for (int t = 0; t < T; ++t) {
      sums_[t] = QuadFloats();
      offsets_[t] = Floats();
    }
  }

  // Multiplies the span at `bytes`, whose first element is column `col`; only its first `groups`
  // groups exist.
  LOCALDS_INLINE void add_span(const Token* tokens, const uint8_t* bytes, int64_t col, int groups) {
    scale(tokens, bytes, col, groups);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      Quad first, second;
      D::quads(bytes, part, groups, first, second);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const int8_t* x = tokens[t].q + col + kSpan / 2 * part;
        if constexpr (D::kHalves) {
          add_products(t, dot_quad<D::kWide>(first, x), spread_halves(factors_[t], 2 * part));
          add_products(t, dot_quad<D::kWide>(second, x + 64),
                       spread_halves(factors_[t], 2 * part + 1));
        } else {
          add_products(t, dot_quads<D::kWide>(first, second, x), spread_groups(factors_[t], part));
        }
      }
    }
  }

  LOCALDS_INLINE float result(int t) const {
    // Without mins the offset of a group is -kZero times its scale.
    const Floats offset = D::kMin ? offsets_[t] : multiply(offsets_[t], floats(-D::kZero));
    return horizontal_sum(add(fold(sums_[t]), offset));
  }

 private:
  LOCALDS_INLINE void scale(const Token* tokens, const uint8_t* bytes, int64_t col, int groups) {
    if constexpr (D::kHalves) {
      Shorts s, m;
      Floats d, dmin;
      D::scales(bytes, s, m, d, dmin);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const Floats xs = load(tokens[t].scale + col / kGroup);
        factors_[t] = half_factors(s, multiply(d, xs));
        const Ints offset = dot_neighbours(D::kMin ? m : s, tokens[t].sum + col / kHalfGroup);
        offsets_[t] = fma(to_floats(offset), multiply(D::kMin ? dmin : d, xs), offsets_[t]);
      }
    } else {
      Floats s, m;
      D::scales(bytes, groups, s, m);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const Floats xs = load(tokens[t].scale + col / kGroup);
        factors_[t] = group_factors(multiply(s, xs));
        if constexpr (!D::kMin && D::kZero == 0) continue;
        const Ints sum = sum_neighbours(tokens[t].sum + col / kHalfGroup);
        offsets_[t] = fma(multiply(to_floats(sum), xs), D::kMin ? m : s, offsets_[t]);
      }
    }
  }

  LOCALDS_INLINE void add_products(int t, QuadInts products, QuadFloats factor) {
    sums_[t] = fma(to_floats(products), factor, sums_[t]);
  }

  QuadFloats sums_[T];
  Floats offsets_[T];
  Factors factors_[T];
};

// A row of weights, and where its products go: for token t to out[t * stride].
struct Row {
  const uint8_t* bytes;
  float* out;
  int64_t stride;
};

// R rows of `cols` weights at a time: the sums of one wait while those of another are added.
template <class D, int T, int R>
void multiply_rows(const Row (&rows)[R], int64_t cols, const Token* tokens) {
  RowProduct<D, T> products[R];
  int64_t col = 0, byte = 0;
  const auto add_spans = [&](int groups, int size) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = rows[r].bytes + byte;
      for (int line = 0; line < size; line += 64) {
        prefetch(at + kAhead + line);
        prefetch_near(at + kNear + line);
      }
      products[r].add_span(tokens, at, col, groups);
    }
  };
  for (; col + kSpan <= cols; col += kSpan, byte += D::kSpanBytes) {
    add_spans(kSpanGroups, D::kSpanBytes);
  }
  if constexpr (requires { D::kBlockBytes; }) {
    const int groups = static_cast<int>((cols - col) / kGroup);
    if (groups) add_spans(groups, groups * D::kBlockBytes);
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) rows[r].out[t * rows[r].stride] = products[r].result(t);
  }
}

// Rows [row0, row1) of a, or of a and b side by side: two streams without a jump from one to the
// other.
template <class D, int T>
void gemv_tokens(const RowsOf& a, const RowsOf* b, int64_t row0, int64_t row1,
                 const Token* tokens) {
  const auto row_of = [row0](const RowsOf& rows, int64_t r) {
    return Row{rows.w->row(rows.batch, r), rows.out + (r - row0), rows.out_stride};
  };
  const int64_t cols = a.w->cols;
  if (b) {
    for (int64_t r = row0; r < row1; ++r) {
      multiply_rows<D, T, 2>({row_of(a, r), row_of(*b, r)}, cols, tokens);
    }
    return;
  }
  const int64_t half = (row1 - row0) / 2;
  for (int64_t r = row0; r < row0 + half; ++r) {
    multiply_rows<D, T, 2>({row_of(a, r), row_of(a, r + half)}, cols, tokens);
  }
  if ((row1 - row0) % 2) multiply_rows<D, T, 1>({row_of(a, row1 - 1)}, cols, tokens);
}

// `b` may be null; if not, it has the type and the columns of `a`.
template <class D>
void gemv_rows(RowsOf a, const RowsOf* b, int64_t row0, int64_t row1, const Activations& x,
               const int32_t* tokens, int64_t n) {
  constexpr int64_t kTokens = 4;
  RowsOf second = b ? *b : a;
  for (int64_t i = 0; i < n; i += kTokens) {
    const int64_t count = n - i < kTokens ? n - i : kTokens;
    Token four[kTokens];
    for (int64_t t = 0; t < count; ++t) {
      four[t] = token_at(x, D::kHalves ? x.q : x.arranged, tokens ? tokens[i + t] : i + t);
    }
    constexpr decltype(&gemv_tokens<D, 1>) kByCount[] = {gemv_tokens<D, 1>, gemv_tokens<D, 2>,
                                                         gemv_tokens<D, 3>, gemv_tokens<D, 4>};
    kByCount[count - 1](a, b ? &second : nullptr, row0, row1, four);
    a.out += kTokens * a.out_stride;
    second.out += kTokens * second.out_stride;
  }
}

}  // namespace localds::LOCALDS_ISA
