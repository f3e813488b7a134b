#include "expert_ffn.h"

#include <algorithm>

#include "kernels.h"

namespace localds {
namespace {

int64_t count_pairs(std::span<const ActiveExpert> experts) {
  int64_t pairs = 0;
  for (const ActiveExpert& e : experts) pairs += e.count;
  return pairs;
}

// The rows [first, first + n) of x.
Activations rows_of(const Activations& x, int64_t first, int64_t n) {
  Activations part = x;
  part.rows = n;
  part.f32 += first * x.f32_stride;
  if (x.q) {
    part.q += first * x.q_stride;
    part.arranged += first * x.q_stride;
    part.scale += first * x.q_stride / kGroup;
    part.sum += first * x.q_stride / kHalfGroup;
  }
  return part;
}

}  // namespace

// Tasks are tiles of every expert's rows, so threads share the work however few experts there are.
Activations gate_experts(std::span<ActiveExpert> experts, const Activations& x,
                         ActivationBuffer& buffer, Scratch& scratch) {
  const FfnWeights& w = experts[0].weights;  // all have the same types and shapes
  const int64_t ff = w.gate.rows;
  const auto active = static_cast<int64_t>(experts.size());
  TiledRows* work = scratch.take<TiledRows>(active);
  int64_t pairs = 0;
  int64_t largest_tile = 0;
  for (size_t i = 0; i < experts.size(); ++i) {
    ActiveExpert& e = experts[i];
    e.row = pairs;
    pairs += e.count;
    const int64_t row_bytes = w.gate.row_bytes + w.up.row_bytes;
    work[i] = {ff, task_rows(row_bytes, e.count, active * ff, scratch.threads())};
    largest_tile = std::max(largest_tile, work[i].tile * e.count);
  }
  float* middle = scratch.take<float>(pairs * ff);
  float* tiles = scratch.take<float>(scratch.threads() * largest_tile);
  {
    Work total = product_work(w.gate, pairs, active);
    total += product_work(w.up, pairs, active);
    const Timed timed("experts: gate, up", total);
    run_tiles({work, experts.size()}, [&](int64_t i, int64_t row0, int64_t row1, int thread) {
      const ActiveExpert& e = experts[static_cast<size_t>(i)];
      gated_tile(e.weights.gate, e.weights.up, 0, row0, row1, x, e.tokens, e.count,
                 middle + e.row * ff, ff, tiles + thread * largest_tile);
    });
  }
  return activations(buffer, middle, pairs, ff, ff, needs_int8(w.down));
}

// Tasks read one expert's rows in a stretch, as memory likes it.
void down_experts(std::span<const ActiveExpert> experts, const Activations& gated, float* outputs,
                  const SharedExpert* shared, float* shared_outputs, Scratch& scratch) {
  const size_t active = experts.size();
  auto* inputs = scratch.take<Activations>(static_cast<int64_t>(active));
  auto* products = scratch.take<Product>(static_cast<int64_t>(active) + 1);
  for (size_t i = 0; i < active; ++i) {
    const ActiveExpert& e = experts[i];
    const int64_t width = e.weights.down.rows;
    inputs[i] = rows_of(gated, e.row, e.count);
    products[i] = {&e.weights.down,           0,    &inputs[i], nullptr, e.count,
                   outputs + e.first * width, width};
  }
  if (shared) {
    products[active] = {
        shared->down,      0, shared->gated, nullptr, shared->gated->rows, shared_outputs,
        shared->down->rows};
  }
  run_products("experts: down", scratch, {products, active + (shared ? 1 : 0)});
}

void add_experts(std::span<const ActiveExpert> experts, const Activations& gated,
                 const SharedExpert* shared, float* x, int64_t width, Scratch& scratch) {
  int64_t row_bytes = 0;
  int64_t most = 0;  // rows of one product
  Work total;
  for (const ActiveExpert& e : experts) {
    row_bytes += e.weights.down.row_bytes;
    most = std::max(most, e.count);
    total += product_work(e.weights.down, e.count);
  }
  int64_t n = count_pairs(experts);
  if (shared) {
    row_bytes += shared->down->row_bytes;
    most = std::max(most, shared->gated->rows);
    total += product_work(*shared->down, shared->gated->rows);
    n += shared->gated->rows;
  }
  TiledRows work{width, task_rows(row_bytes, n, width, scratch.threads())};
  float* tiles = scratch.take<float>(scratch.threads() * most * work.tile);
  const Timed timed("experts: down", total);
  run_tiles({&work, 1}, [&](int64_t, int64_t row0, int64_t row1, int thread) {
    const int64_t rows = row1 - row0;
    float* tile = tiles + thread * most * work.tile;
    for (const ActiveExpert& e : experts) {
      matmul_rows(e.weights.down, 0, row0, row1, rows_of(gated, e.row, e.count), nullptr, e.count,
                  tile, rows);
      for (int64_t i = 0; i < e.count; ++i) {
        kernels().axpy(e.token_weights[i], tile + i * rows, rows, x + e.tokens[i] * width + row0);
      }
    }
    if (shared) {
      matmul_rows(*shared->down, 0, row0, row1, *shared->gated, nullptr, shared->gated->rows, tile,
                  rows);
      for (int64_t i = 0; i < shared->gated->rows; ++i) {
        kernels().axpy(1.0f, tile + i * rows, rows, x + i * width + row0);
      }
    }
  });
}

}  // namespace localds
