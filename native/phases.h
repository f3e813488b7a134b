// How a fused operation is cut into pool runs: rows of activations, tiles of weight rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "profile.h"
#include "scratch.h"
#include "thread_pool.h"

namespace localds {

// Calls body(row0, row1, thread) for all of [0, rows), where a row costs about `row_cost` simple
// operations. Little work stays on the calling thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t row_cost, Body&& body) {
  constexpr int64_t kTaskCost = 32768;  // some 10 us
  const int64_t block = std::max<int64_t>(1, kTaskCost / std::max<int64_t>(1, row_cost));
  const int64_t tasks = (rows + block - 1) / block;
  auto task = [&](int64_t i, int thread) {
    body(i * block, std::min(rows, (i + 1) * block), thread);
  };
  ThreadPool::instance().run(tasks, std::ref(task));
}

// Rows of a task when each of `all_rows` rows means reading `row_bytes` bytes of weights and
// multiplying them with n tokens: small enough to share out evenly, large enough for the hand-out,
// and for the packing of many tokens, to cost little.
int64_t task_rows(int64_t row_bytes, int64_t n, int64_t all_rows, int threads);

// `rows` weight rows to be worked on in tiles of `tile` rows.
struct TiledRows {
  int64_t rows;
  int64_t tile;
  int64_t first_task = 0;  // filled in by run_tiles
};

// One pool run over all tiles: body(index into work, row0, row1, thread).
template <class Body>
void run_tiles(std::span<TiledRows> work, Body&& body) {
  int64_t tasks = 0;
  for (TiledRows& part : work) {
    part.first_task = tasks;
    tasks += (part.rows + part.tile - 1) / part.tile;
  }
  auto task = [&](int64_t i, int thread) {
    const auto after = std::upper_bound(
        work.begin(), work.end(), i,
        [](int64_t task, const TiledRows& part) { return task < part.first_task; });
    const TiledRows& part = *(after - 1);
    const int64_t row0 = (i - part.first_task) * part.tile;
    body(after - 1 - work.begin(), row0, std::min(part.rows, row0 + part.tile), thread);
  };
  ThreadPool::instance().run(tasks, std::ref(task));
}

// out[i * out_stride + r] = w[batch, r, :] . x[tokens ? tokens[i] : i, :] for i in [0, n).
struct Product {
  const Matrix* w;
  int64_t batch;
  const Activations* x;
  const int32_t* tokens;
  int64_t n;
  float* out;
  int64_t out_stride;
};

// All products in one pool run, the step `name` of the profile.
void run_products(const char* name, Scratch& scratch, std::span<const Product> products);

// residual[i, :] += w . x[i, :], in one pool run; `out` is scratch, [x.rows, w.rows].
void add_product(const char* name, Scratch& scratch, const Matrix& w, const Activations& x,
                 float* out, float* residual);

bool needs_int8(const Matrix& w);

// A norm of `weight.size()` values.
struct Norm {
  std::vector<float> weight;
  float eps;

  int64_t width() const { return static_cast<int64_t>(weight.size()); }
};

// The rows of x [n, cols], `stride` floats apart, ready for products. Valid until the buffer is
// used again.
Activations activations(ActivationBuffer& buffer, const float* x, int64_t n, int64_t cols,
                        int64_t stride, bool int8);

// Normalizes the rows of x [n, norm.width()] into `out` (which may be x) and readies them.
Activations normalized(ActivationBuffer& buffer, const Norm& norm, const float* x, int64_t n,
                       float* out, bool int8);

// Throws std::invalid_argument unless w has these dimensions.
void expect_shape(const char* role, const Matrix& w, int64_t rows, int64_t cols, int64_t batch = 1);

}  // namespace localds
