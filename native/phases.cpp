#include "phases.h"

#include <stdexcept>
#include <string>

namespace localds {

static constexpr char kInputs[] = "norms, int8 inputs";

int64_t task_rows(int64_t row_bytes, int64_t n, int64_t all_rows, int threads) {
  constexpr int64_t kStep = 16;              // a multiple of every kernel's panel
  constexpr int64_t kFewTokens = 8;          // up to here, reading weights takes the time
  constexpr int64_t kTaskBytes = 512 << 10;  // some 30 us of one core's reading
  constexpr int64_t kManyTokensRows = 128;
  constexpr int64_t kTasksPerThread = 8;
  const int64_t wanted = n <= kFewTokens ? kTaskBytes / row_bytes : kManyTokensRows;
  const int64_t rows = std::min(wanted, all_rows / (kTasksPerThread * threads));
  return std::max<int64_t>(1, (rows + kStep - 1) / kStep) * kStep;
}

void run_products(const char* name, Scratch& scratch, std::span<const Product> products) {
  const auto count = static_cast<int64_t>(products.size());
  int64_t all_rows = 0;
  Work total;
  for (const Product& p : products) {
    all_rows += p.w->rows;
    total += product_work(*p.w, p.n);
  }
  TiledRows* work = scratch.take<TiledRows>(count);
  for (int64_t i = 0; i < count; ++i) {
    const Product& p = products[i];
    work[i] = {p.w->rows, task_rows(p.w->row_bytes, p.n, all_rows, scratch.threads())};
  }
  const Timed timed(name, total);
  run_tiles({work, products.size()}, [&](int64_t i, int64_t row0, int64_t row1, int) {
    const Product& p = products[i];
    matmul_rows(*p.w, p.batch, row0, row1, *p.x, p.tokens, p.n, p.out + row0, p.out_stride);
  });
}

void add_product(const char* name, Scratch& scratch, const Matrix& w, const Activations& x,
                 float* out, float* residual) {
  const Timed timed(name, product_work(w, x.rows));
  TiledRows work{w.rows, task_rows(w.row_bytes, x.rows, w.rows, scratch.threads())};
  run_tiles({&work, 1}, [&](int64_t, int64_t row0, int64_t row1, int) {
    matmul_rows(w, 0, row0, row1, x, nullptr, x.rows, out + row0, w.rows);
    for (int64_t i = 0; i < x.rows; ++i) {
      const int64_t at = i * w.rows + row0;
      kernels().axpy(1.0f, out + at, row1 - row0, residual + at);
    }
  });
}

bool needs_int8(const Matrix& w) { return !type_info(w.type).is_float; }

Activations activations(ActivationBuffer& buffer, const float* x, int64_t n, int64_t cols,
                        int64_t stride, bool int8) {
  if (!int8) return {.rows = n, .cols = cols, .f32 = x, .f32_stride = stride};
  const Timed timed(kInputs);
  buffer.reserve(x, n, cols, stride);
  parallel_rows(n, cols, [&](int64_t row0, int64_t row1, int) { buffer.quantize(row0, row1); });
  return buffer.view();
}

Activations normalized(ActivationBuffer& buffer, const Norm& norm, const float* x, int64_t n,
                       float* out, bool int8) {
  const Timed timed(kInputs);
  const int64_t width = norm.width();
  if (int8) buffer.reserve(out, n, width, width);
  parallel_rows(n, 2 * width, [&](int64_t row0, int64_t row1, int) {
    for (int64_t i = row0; i < row1; ++i) {
      kernels().rms_norm(x + i * width, norm.weight.data(), norm.eps, width, out + i * width);
    }
    if (int8) buffer.quantize(row0, row1);
  });
  if (int8) return buffer.view();
  return {.rows = n, .cols = width, .f32 = out, .f32_stride = width};
}

void expect_shape(const char* role, const Matrix& w, int64_t rows, int64_t cols, int64_t batch) {
  if (w.rows == rows && w.cols == cols && w.batch == batch) return;
  const auto text = [](int64_t c, int64_t r, int64_t b) {
    return std::string("{") + std::to_string(c) + ", " + std::to_string(r) + ", " +
           std::to_string(b) + "}";
  };
  throw std::invalid_argument(std::string(role) + ": matrix has shape " +
                              text(w.cols, w.rows, w.batch) + ", expected " +
                              text(cols, rows, batch));
}

}  // namespace localds
