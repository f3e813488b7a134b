#include "head.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"
#include "scratch.h"

namespace localds {

void embed(const Matrix& table, const int32_t* ids, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] >= 0 && ids[i] < table.rows) continue;
    throw std::invalid_argument("embedding: token id " + std::to_string(ids[i]) +
                                " is outside the vocabulary of " + std::to_string(table.rows));
  }
  parallel_rows(n, table.cols, [&](int64_t i0, int64_t i1, int) {
    for (int64_t i = i0; i < i1; ++i) {
      dequantize_row(table.type, table.row(0, ids[i]), out + i * table.cols, table.cols);
    }
  });
}

HeadLayer::HeadLayer(Norm norm, Matrix output)
    : norm_(std::move(norm)), output_(std::move(output)) {
  expect_shape("head output", output_, output_.rows, hidden());
}

void HeadLayer::forward(const float* x, int64_t n, float* logits, Recorder* recorder) const {
  if (n == 0) return;
  Scratch scratch;
  float* hidden_rows = scratch.take<float>(n * hidden());
  const Activations in =
      normalized(scratch.activations(0), norm_, x, n, hidden_rows, needs_int8(output_));
  if (recorder) recorder->add("hidden", in);
  const Product product{&output_, 0, &in, nullptr, n, logits, output_.rows};
  run_products("head", scratch, {&product, 1});
}

}  // namespace localds
