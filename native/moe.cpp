#include "moe.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels.h"

namespace localds {

// Up to so many pairs of a token and an expert, reading weights takes the time.
static constexpr int64_t kFewPairs = 64;

MoeLayer::MoeLayer(Norm norm, Matrix router_weight, Router router, FfnWeights experts,
                   std::optional<FfnWeights> shared)
    : norm_(std::move(norm)),
      router_weight_(std::move(router_weight)),
      router_(std::move(router)),
      experts_(std::move(experts)),
      shared_(std::move(shared)) {
  router_.check();
  if (needs_int8(router_weight_)) throw std::invalid_argument("moe: the router must be float");
  expect_shape("moe router", router_weight_, router_.experts, hidden());
  check_ffn("moe experts", experts_, hidden(), router_.experts);
  if (shared_) check_ffn("moe shared expert", *shared_, hidden());
}

void MoeLayer::route(const float* x, int64_t n, int32_t* ids, float* weights) const {
  if (n == 0) return;
  Scratch scratch;
  float* hidden_rows = scratch.take<float>(n * hidden());
  float* logits = scratch.take<float>(n * router_.experts);
  const Activations in = normalized(scratch.activations(0), norm_, x, n, hidden_rows, false);
  const Product product{&router_weight_, 0, &in, nullptr, n, logits, router_.experts};
  run_products("experts: router", scratch, {&product, 1});
  choose(logits, n, ids, weights, scratch);
}

void MoeLayer::forward(float* x, int64_t n, Recorder* recorder) const {
  if (n == 0) return;
  Scratch scratch;
  float* hidden_rows = scratch.take<float>(n * hidden());
  const bool int8 = needs_int8(experts_.gate) || needs_int8(experts_.up) ||
                    (shared_ && (needs_int8(shared_->gate) || needs_int8(shared_->up)));
  const Activations in = normalized(scratch.activations(0), norm_, x, n, hidden_rows, int8);

  const int64_t shared_ff = shared_ ? shared_->gate.rows : 0;
  float* logits = scratch.take<float>(n * router_.experts);
  float* shared_middle = scratch.take<float>(n * shared_ff);
  score(in, logits, shared_middle, scratch);

  int32_t* ids = scratch.take<int32_t>(n * router_.top_k);
  float* weights = scratch.take<float>(n * router_.top_k);
  choose(logits, n, ids, weights, scratch);
  const ExpertPairs pairs = group(ids, weights, n, scratch);
  const float* middle = gate_experts(in, pairs, scratch);

  const int64_t ff = experts_.gate.rows;
  const Activations gated =
      activations(scratch.activations(1), middle, pairs.pairs, ff, ff, needs_int8(experts_.down));
  Activations shared_gated;
  if (shared_) {
    shared_gated = activations(scratch.activations(2), shared_middle, n, shared_ff, shared_ff,
                               needs_int8(shared_->down));
  }
  if (recorder) {
    record(in, gated, pairs, scratch, *recorder);
    if (shared_) recorder->add("shared_middle", shared_gated);
  }
  add_experts(gated, pairs, shared_ ? &shared_gated : nullptr, x, n, scratch);
}

void MoeLayer::record(const Activations& x, const Activations& gated, const ExpertPairs& pairs,
                      Scratch& scratch, Recorder& recorder) const {
  const size_t active = pairs.experts.size();
  auto* inputs = scratch.take<RecordedRows>(static_cast<int64_t>(active));
  auto* middles = scratch.take<RecordedRows>(static_cast<int64_t>(active));
  for (size_t i = 0; i < active; ++i) {
    const ExpertPairs::Expert& e = pairs.experts[i];
    inputs[i] = {e.id, x.f32, x.f32_stride, pairs.tokens + e.first, e.count};
    middles[i] = {e.id, gated.f32 + e.first * gated.f32_stride, gated.f32_stride, nullptr, e.count};
  }
  recorder.add("hidden", x);
  recorder.add("expert_hidden", router_.experts, x.cols, {inputs, active});
  recorder.add("expert_middle", router_.experts, gated.cols, {middles, active});
}

// The router's logits, and the shared expert up to its down matrix: neither waits for a choice, so
// they make one run.
void MoeLayer::score(const Activations& x, float* logits, float* shared_middle,
                     Scratch& scratch) const {
  const int64_t n = x.rows;
  const int threads = scratch.threads();
  const int64_t shared_ff = shared_ ? shared_->gate.rows : 0;
  const int64_t all_rows = router_.experts + shared_ff;
  TiledRows work[2] = {
      {router_.experts, task_rows(router_weight_.row_bytes, n, all_rows, threads)}};
  float* tiles = nullptr;
  Work total = product_work(router_weight_, n);
  if (shared_) {
    const int64_t row_bytes = shared_->gate.row_bytes + shared_->up.row_bytes;
    work[1] = {shared_ff, task_rows(row_bytes, n, all_rows, threads)};
    tiles = scratch.take<float>(threads * n * work[1].tile);
    total += product_work(shared_->gate, n);
    total += product_work(shared_->up, n);
  }
  const Timed timed("experts: router, shared gate, up", total);
  run_tiles({work, shared_ ? 2u : 1u}, [&](int64_t i, int64_t row0, int64_t row1, int thread) {
    if (i == 0) {
      matmul_rows(router_weight_, 0, row0, row1, x, nullptr, n, logits + row0, router_.experts);
    } else {
      gated_tile(shared_->gate, shared_->up, 0, row0, row1, x, nullptr, n, shared_middle, shared_ff,
                 tiles + thread * n * work[1].tile);
    }
  });
}

void MoeLayer::choose(float* logits, int64_t n, int32_t* ids, float* weights,
                      Scratch& scratch) const {
  const Timed timed("experts: choice");
  const int64_t experts = router_.experts;
  float* work = scratch.take<float>(scratch.threads() * 2 * experts);
  parallel_rows(n, 16 * experts, [&](int64_t t0, int64_t t1, int thread) {
    for (int64_t t = t0; t < t1; ++t) {
      choose_experts(router_, logits + t * experts, work + thread * 2 * experts,
                     ids + t * router_.top_k, weights + t * router_.top_k);
    }
  });
}

// Counting sort of the choices by expert.
ExpertPairs MoeLayer::group(const int32_t* ids, const float* weights, int64_t n,
                            Scratch& scratch) const {
  const int64_t pairs = n * router_.top_k;
  auto* experts = scratch.take<ExpertPairs::Expert>(router_.experts);
  auto* next = scratch.take<int64_t>(router_.experts);
  auto* tokens = scratch.take<int32_t>(pairs);
  auto* pair_weights = scratch.take<float>(pairs);
  std::fill(next, next + router_.experts, 0);
  for (int64_t i = 0; i < pairs; ++i) ++next[ids[i]];

  int64_t active = 0;
  int64_t first = 0;
  for (int64_t e = 0; e < router_.experts; ++e) {
    const int64_t count = next[e];
    if (count > 0) experts[active++] = {static_cast<int32_t>(e), first, count};
    next[e] = first;
    first += count;
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t at = next[ids[i]]++;
    tokens[at] = static_cast<int32_t>(i / router_.top_k);
    pair_weights[at] = weights[i];
  }
  return {{experts, static_cast<size_t>(active)}, tokens, pair_weights, pairs};
}

// silu(gate(x)) * up(x) of every pair, [pairs, ff]. Tasks are tiles of every expert's rows, so
// threads share the work however few experts there are.
float* MoeLayer::gate_experts(const Activations& x, const ExpertPairs& pairs,
                              Scratch& scratch) const {
  const int64_t ff = experts_.gate.rows;
  TiledRows* work = scratch.take<TiledRows>(pairs.experts.size());
  const int64_t row_bytes = experts_.gate.row_bytes + experts_.up.row_bytes;
  const auto all_rows = static_cast<int64_t>(pairs.experts.size()) * ff;
  int64_t largest_tile = 0;
  for (size_t i = 0; i < pairs.experts.size(); ++i) {
    const int64_t count = pairs.experts[i].count;
    work[i] = {ff, task_rows(row_bytes, count, all_rows, scratch.threads())};
    largest_tile = std::max(largest_tile, work[i].tile * count);
  }
  float* middle = scratch.take<float>(pairs.pairs * ff);
  float* tiles = scratch.take<float>(scratch.threads() * largest_tile);
  const auto active = static_cast<int64_t>(pairs.experts.size());
  Work total = product_work(experts_.gate, pairs.pairs, active);
  total += product_work(experts_.up, pairs.pairs, active);
  const Timed timed("experts: gate, up", total);
  run_tiles({work, pairs.experts.size()}, [&](int64_t i, int64_t row0, int64_t row1, int thread) {
    const ExpertPairs::Expert& e = pairs.experts[i];
    gated_tile(experts_.gate, experts_.up, e.id, row0, row1, x, pairs.tokens + e.first, e.count,
               middle + e.first * ff, ff, tiles + thread * largest_tile);
  });
  return middle;
}

// The rows [first, first + n) of x.
static Activations rows_of(const Activations& x, int64_t first, int64_t n) {
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

// x += weight * down(gated) for every pair, then the shared expert's, always in this order.
void MoeLayer::add_experts(const Activations& gated, const ExpertPairs& pairs,
                           const Activations* shared_gated, float* x, int64_t n,
                           Scratch& scratch) const {
  if (pairs.pairs <= kFewPairs) {
    add_few(gated, pairs, shared_gated, x, n, scratch);
  } else {
    add_many(gated, pairs, shared_gated, x, n, scratch);
  }
}

// All products first: tasks read one expert's rows in a stretch, as memory likes it.
void MoeLayer::add_few(const Activations& gated, const ExpertPairs& pairs,
                       const Activations* shared_gated, float* x, int64_t n,
                       Scratch& scratch) const {
  const int64_t width = hidden();
  const size_t active = pairs.experts.size();
  float* outputs = scratch.take<float>(pairs.pairs * width);
  float* shared_outputs = scratch.take<float>(n * width);
  auto* inputs = scratch.take<Activations>(static_cast<int64_t>(active));
  auto* products = scratch.take<Product>(static_cast<int64_t>(active) + 1);
  for (size_t i = 0; i < active; ++i) {
    const ExpertPairs::Expert& e = pairs.experts[i];
    inputs[i] = rows_of(gated, e.first, e.count);
    products[i] = {&experts_.down, e.id, &inputs[i], nullptr, e.count, outputs + e.first * width,
                   width};
  }
  if (shared_gated) {
    products[active] = {&shared_->down, 0, shared_gated, nullptr, n, shared_outputs, width};
  }
  run_products("experts: down", scratch, {products, active + (shared_gated ? 1 : 0)});

  const Timed timed("experts: sum");
  for (int64_t i = 0; i < pairs.pairs; ++i) {
    kernels().axpy(pairs.weights[i], outputs + i * width, width, x + pairs.tokens[i] * width);
  }
  if (shared_gated) kernels().axpy(1.0f, shared_outputs, n * width, x);
}

// A task owns a range of output rows and walks through all experts: no output of a pair is kept.
void MoeLayer::add_many(const Activations& gated, const ExpertPairs& pairs,
                        const Activations* shared_gated, float* x, int64_t n,
                        Scratch& scratch) const {
  const int64_t width = hidden();
  int64_t row_bytes = static_cast<int64_t>(pairs.experts.size()) * experts_.down.row_bytes;
  if (shared_gated) row_bytes += shared_->down.row_bytes;
  TiledRows work{width, task_rows(row_bytes, n, width, scratch.threads())};
  float* tiles = scratch.take<float>(scratch.threads() * n * work.tile);
  Work total = product_work(experts_.down, pairs.pairs, static_cast<int64_t>(pairs.experts.size()));
  if (shared_gated) total += product_work(shared_->down, n);
  const Timed timed("experts: down", total);
  run_tiles({&work, 1}, [&](int64_t, int64_t row0, int64_t row1, int thread) {
    const int64_t rows = row1 - row0;
    float* tile = tiles + thread * n * work.tile;
    for (const ExpertPairs::Expert& e : pairs.experts) {
      matmul_rows(experts_.down, e.id, row0, row1, rows_of(gated, e.first, e.count), nullptr,
                  e.count, tile, rows);
      for (int64_t i = 0; i < e.count; ++i) {
        const int64_t pair = e.first + i;
        kernels().axpy(pairs.weights[pair], tile + i * rows, rows,
                       x + pairs.tokens[pair] * width + row0);
      }
    }
    if (shared_gated) {
      matmul_rows(shared_->down, 0, row0, row1, *shared_gated, nullptr, n, tile, rows);
      for (int64_t i = 0; i < n; ++i) {
        kernels().axpy(1.0f, tile + i * rows, rows, x + i * width + row0);
      }
    }
  });
}

}  // namespace localds
