#include "mla.h"

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "scratch.h"

namespace localds {

// One forward: its sizes and its scratch memory.
struct MlaLayer::Call {
  const MlaLayer& layer;
  Scratch& scratch;
  int64_t n;
  const CacheRows& cache;
  int64_t past;

  int64_t heads = layer.heads_;
  int64_t head = layer.nope_ + layer.rope_width_;  // width of a query head
  int64_t row = layer.kv_rank_ + layer.rope_width_;
  float* q = scratch.take<float>(n * heads * head);
  float* kv = scratch.take<float>(n * row);
  float* absorbed = scratch.take<float>(n * heads * row);  // [n, heads, kv_rank + rope]
  int32_t* head_rows = scratch.take<int32_t>(heads * n);   // rows of head h in [n, heads, ...]

  void project(const Activations& x);
  void position_rows();
  void absorb_queries();
  Activations attend_and_expand();
};

MlaLayer::MlaLayer(MlaWeights weights, Rope rope, float softmax_scale)
    : weights_(std::move(weights)),
      rope_(std::move(rope)),
      softmax_scale_(softmax_scale),
      heads_(weights_.k_b.batch),
      nope_(weights_.k_b.cols),
      rope_width_(rope_.width()),
      value_(weights_.v_b.rows),
      kv_rank_(weights_.kv_norm.width()) {
  const int64_t q_cols = weights_.q_a ? weights_.q_a->rows : hidden();
  if (weights_.q_a) {
    if (!weights_.q_norm) throw std::invalid_argument("mla: q_a needs q_norm");
    expect_shape("mla q_a", *weights_.q_a, weights_.q_norm->width(), hidden());
  }
  expect_shape("mla q", weights_.q, heads_ * (nope_ + rope_width_), q_cols);
  expect_shape("mla kv_a", weights_.kv_a, kv_rank_ + rope_width_, hidden());
  expect_shape("mla k_b", weights_.k_b, kv_rank_, nope_, heads_);
  expect_shape("mla v_b", weights_.v_b, value_, kv_rank_, heads_);
  expect_shape("mla output", weights_.output, hidden(), heads_ * value_);
}

void MlaLayer::forward(float* x, int64_t n, const CacheRows& cache, int64_t past) const {
  check_cache(cache, kv_rank_ + rope_width_, kv_rank_ + rope_width_, past, n);
  if (n == 0) return;
  Scratch scratch;
  const MlaWeights& w = weights_;
  float* hidden_rows = scratch.take<float>(n * hidden());
  const bool int8 = needs_int8(w.q_a ? *w.q_a : w.q) || needs_int8(w.kv_a);
  Call call{*this, scratch, n, cache, past};
  call.project(normalized(scratch.activations(0), w.norm, x, n, hidden_rows, int8));
  call.position_rows();
  call.absorb_queries();
  const Activations values = call.attend_and_expand();
  add_product(scratch, w.output, values, hidden_rows, x);
}

// q and kv from the normalized hidden states.
void MlaLayer::Call::project(const Activations& x) {
  const MlaWeights& w = layer.weights_;
  const int64_t q_width = heads * head;
  if (!w.q_a) {
    const Product products[] = {{&w.q, 0, &x, nullptr, n, q, q_width},
                                {&w.kv_a, 0, &x, nullptr, n, kv, row}};
    run_products(scratch, products);
    return;
  }
  const int64_t rank = w.q_a->rows;
  float* low = scratch.take<float>(n * rank);
  const Product products[] = {{&*w.q_a, 0, &x, nullptr, n, low, rank},
                              {&w.kv_a, 0, &x, nullptr, n, kv, row}};
  run_products(scratch, products);
  const Activations low_x =
      normalized(scratch.activations(0), *w.q_norm, low, n, low, needs_int8(w.q));
  const Product expand[] = {{&w.q, 0, &low_x, nullptr, n, q, q_width}};
  run_products(scratch, expand);
}

// Rotates and scales the queries, writes the cached rows.
void MlaLayer::Call::position_rows() {
  const Norm& norm = layer.weights_.kv_norm;
  const Rope& rope = layer.rope_;
  float* tables = scratch.take<float>(n * rope.width());
  parallel_rows(n, 2 * heads * head, [&](int64_t t0, int64_t t1, int) {
    for (int64_t t = t0; t < t1; ++t) {
      float* angles = tables + t * rope.width();
      rope.angles(past + t, angles);

      float* latent = kv + t * row;
      kernels().rms_norm(latent, norm.weight.data(), norm.eps, layer.kv_rank_, latent);
      rotate(latent + layer.kv_rank_, angles, rope.pairs());
      quantize_row(cache.type, latent, cache.row(past + t), row);

      for (int64_t h = 0; h < heads; ++h) {
        float* query = q + (t * heads + h) * head;
        float* to = absorbed + (t * heads + h) * row + layer.kv_rank_;
        kernels().scale(layer.softmax_scale_, head, query);
        rotate(query + layer.nope_, angles, rope.pairs());
        std::copy(query + layer.nope_, query + head, to);
        head_rows[h * n + t] = static_cast<int32_t>(t * heads + h);
      }
    }
  });
}

// The position-free part of each query times its head's k_b: now it meets the latent directly.
void MlaLayer::Call::absorb_queries() {
  const Matrix& k_b = layer.weights_.k_b;
  const Activations queries =
      activations(scratch.activations(1), q, n * heads, layer.nope_, head, needs_int8(k_b));
  Product* products = scratch.take<Product>(heads);
  for (int64_t h = 0; h < heads; ++h) {
    products[h] = {&k_b, h, &queries, head_rows + h * n, n, absorbed + h * row, heads * row};
  }
  run_products(scratch, {products, static_cast<size_t>(heads)});
}

// Attention over the latents, and each head's v_b on its context.
Activations MlaLayer::Call::attend_and_expand() {
  const Matrix& v_b = layer.weights_.v_b;
  const int64_t rank = layer.kv_rank_;
  const AttentionShape shape{1, heads, row, rank, 0, true};
  float* context = scratch.take<float>(n * heads * rank);
  attend(shape, cache, past, n, absorbed, context, scratch);

  const Activations contexts =
      activations(scratch.activations(1), context, n * heads, rank, rank, needs_int8(v_b));
  const int64_t width = heads * layer.value_;
  float* values = scratch.take<float>(n * width);
  Product* products = scratch.take<Product>(heads);
  for (int64_t h = 0; h < heads; ++h) {
    products[h] = {&v_b, h, &contexts, head_rows + h * n, n, values + h * layer.value_, width};
  }
  run_products(scratch, {products, static_cast<size_t>(heads)});
  const bool int8 = needs_int8(layer.weights_.output);
  return activations(scratch.activations(0), values, n, width, width, int8);
}

}  // namespace localds
