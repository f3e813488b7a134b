#include "ffn.h"

#include <string>
#include <utility>

#include "kernels.h"
#include "scratch.h"

namespace localds {

void check_ffn(const char* role, const FfnWeights& weights, int64_t hidden, int64_t batch) {
  const std::string name(role);
  const int64_t ff = weights.gate.rows;
  expect_shape((name + " gate").c_str(), weights.gate, ff, hidden, batch);
  expect_shape((name + " up").c_str(), weights.up, ff, hidden, batch);
  expect_shape((name + " down").c_str(), weights.down, hidden, ff, batch);
}

void gated_tile(const Matrix& gate, const Matrix& up, int64_t batch, int64_t row0, int64_t row1,
                const Activations& x, const int32_t* tokens, int64_t n, float* out,
                int64_t out_stride, float* work) {
  const int64_t rows = row1 - row0;
  matmul_two_rows({&gate, batch, out + row0, out_stride}, {&up, batch, work, rows}, row0, row1, x,
                  tokens, n);
  for (int64_t i = 0; i < n; ++i) {
    float* row = out + i * out_stride + row0;
    kernels().swiglu(row, work + i * rows, rows, row);
  }
}

void gated_rows(const char* name, const FfnWeights& w, const Activations& x, float* out,
                Scratch& scratch) {
  const int64_t n = x.rows;
  const int64_t ff = w.gate.rows;
  const int64_t row_bytes = w.gate.row_bytes + w.up.row_bytes;
  TiledRows work{ff, task_rows(row_bytes, n, ff, scratch.threads())};
  float* tiles = scratch.take<float>(scratch.threads() * n * work.tile);
  Work total = product_work(w.gate, n);
  total += product_work(w.up, n);
  const Timed timed(name, total);
  run_tiles({&work, 1}, [&](int64_t, int64_t row0, int64_t row1, int thread) {
    gated_tile(w.gate, w.up, 0, row0, row1, x, nullptr, n, out, ff, tiles + thread * n * work.tile);
  });
}

FfnLayer::FfnLayer(Norm norm, FfnWeights weights)
    : norm_(std::move(norm)), weights_(std::move(weights)) {
  check_ffn("ffn", weights_, hidden());
}

void FfnLayer::forward(float* x, int64_t n, Recorder* recorder) const {
  if (n == 0) return;
  Scratch scratch;
  const FfnWeights& w = weights_;
  const int64_t ff = w.gate.rows;
  float* hidden_rows = scratch.take<float>(n * hidden());
  const Activations in = normalized(scratch.activations(0), norm_, x, n, hidden_rows,
                                    needs_int8(w.gate) || needs_int8(w.up));

  float* middle = scratch.take<float>(n * ff);
  gated_rows("dense: gate, up", w, in, middle, scratch);

  const Activations gated =
      activations(scratch.activations(1), middle, n, ff, ff, needs_int8(w.down));
  if (recorder) {
    recorder->add("hidden", in);
    recorder->add("middle", gated);
  }
  add_product("dense: down", scratch, w.down, gated, hidden_rows, x);
}

}  // namespace localds
