#include "mla.h"

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "mla_expanded.h"
#include "scratch.h"

namespace localds {

// One forward: its sizes and its scratch memory.
struct MlaLayer::Call {
  const MlaLayer& layer;
  Scratch& scratch;
  int64_t n;
  const CacheRows& cache;
  int64_t past;
  Recorder* recorder;

  int64_t heads = layer.heads_;
  int64_t head = layer.nope_ + layer.rope_width_;  // width of a query head
  int64_t row = layer.kv_rank_ + layer.rope_width_;
  float* q = scratch.take<float>(n * heads * head);
  float* kv = scratch.take<float>(n * row);

  void project(const Activations& x);
  void position_rows();
  bool expanding_pays() const;
  void attend_expanded(float* values);
  void attend_absorbed(float* values);
  void absorb_queries(const int32_t* head_rows, float* absorbed);
  void record_heads(const char* name, const float* x, int64_t columns, int64_t stride);
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

void MlaLayer::forward(float* x, int64_t n, const CacheRows& cache, int64_t past,
                       Recorder* recorder) const {
  check_cache(cache, kv_rank_ + rope_width_, kv_rank_ + rope_width_, past, n);
  if (n == 0) return;
  Scratch scratch;
  const MlaWeights& w = weights_;
  float* hidden_rows = scratch.take<float>(n * hidden());
  const bool int8 = needs_int8(w.q_a ? *w.q_a : w.q) || needs_int8(w.kv_a);
  Call call{*this, scratch, n, cache, past, recorder};
  call.project(normalized(scratch.activations(0), w.norm, x, n, hidden_rows, int8));
  call.position_rows();
  const int64_t width = heads_ * value_;
  float* values = scratch.take<float>(n * width);
  if (!recorder && call.expanding_pays()) {
    call.attend_expanded(values);
  } else {
    call.attend_absorbed(values);
  }
  const Activations in =
      activations(scratch.activations(0), values, n, width, width, needs_int8(w.output));
  if (recorder) recorder->add("values", in);
  add_product("attention: output", scratch, w.output, in, hidden_rows, x);
}

// q and kv from the normalized hidden states.
void MlaLayer::Call::project(const Activations& x) {
  const MlaWeights& w = layer.weights_;
  const int64_t q_width = heads * head;
  if (recorder) recorder->add("hidden", x);
  if (!w.q_a) {
    const Product products[] = {{&w.q, 0, &x, nullptr, n, q, q_width},
                                {&w.kv_a, 0, &x, nullptr, n, kv, row}};
    run_products("attention: q, kv_a", scratch, products);
    return;
  }
  const int64_t rank = w.q_a->rows;
  float* low = scratch.take<float>(n * rank);
  const Product products[] = {{&*w.q_a, 0, &x, nullptr, n, low, rank},
                              {&w.kv_a, 0, &x, nullptr, n, kv, row}};
  run_products("attention: q_a, kv_a", scratch, products);
  const Activations low_x =
      normalized(scratch.activations(0), *w.q_norm, low, n, low, needs_int8(w.q));
  if (recorder) recorder->add("low_query", low_x);
  const Product expand[] = {{&w.q, 0, &low_x, nullptr, n, q, q_width}};
  run_products("attention: q_b", scratch, expand);
}

// Rotates and scales the queries, writes the cached rows.
void MlaLayer::Call::position_rows() {
  const Timed timed("attention: rope, cache rows");
  const Norm& norm = layer.weights_.kv_norm;
  const Rope& rope = layer.rope_;
  float* tables = scratch.take<float>(n * rope.width());
  if (recorder) record_heads("query", q, layer.nope_, head);  // before softmax_scale goes in
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
        kernels().scale(layer.softmax_scale_, head, query);
        rotate(query + layer.nope_, angles, rope.pairs());
      }
    }
  });
  if (recorder) {
    recorder->add("latent", {.rows = n, .cols = layer.kv_rank_, .f32 = kv, .f32_stride = row});
  }
}

// Adds x [n, heads, stride], of which the first `columns` are used, head by head.
void MlaLayer::Call::record_heads(const char* name, const float* x, int64_t columns,
                                  int64_t stride) {
  auto* parts = scratch.take<RecordedRows>(heads);
  for (int64_t h = 0; h < heads; ++h) parts[h] = {h, x + h * stride, heads * stride, nullptr, n};
  recorder->add(name, heads, columns, {parts, static_cast<size_t>(heads)});
}

// Whether expanded keys and values cost less, in multiplications of a head: with n tokens that see
// some `seen` rows each, of past + n in all.
bool MlaLayer::Call::expanding_pays() const {
  const double seen = static_cast<double>(past) + static_cast<double>(n) / 2;
  const auto tokens = static_cast<double>(n);
  const auto expansion = static_cast<double>(layer.kv_rank_ * (layer.nope_ + layer.value_));
  // Absorbing multiplies by the same matrices, in int8: some three times as fast.
  const double absorbed =
      tokens * (seen * static_cast<double>(row + layer.kv_rank_) + expansion / 3);
  const double expanded = tokens * seen * static_cast<double>(head + layer.value_) +
                          static_cast<double>(past + n) * expansion;
  return expanded < absorbed;
}

void MlaLayer::Call::attend_expanded(float* values) {
  const AttentionShape shape{heads, 1, head, layer.value_};
  float* by_head = scratch.take<float>(heads * n * head);
  {
    const Timed timed("attention: queries by head");
    parallel_rows(heads * n, head, [&](int64_t i0, int64_t i1, int) {
      for (int64_t i = i0; i < i1; ++i) {
        std::copy_n(q + (i % n * heads + i / n) * head, head, by_head + i * head);
      }
    });
  }
  const ExpandedLatents source(layer.weights_.k_b, layer.weights_.v_b, layer.rope_width_, cache);
  attend(shape, source, past, n, by_head, values, scratch);
}

// Attention over the latents themselves, and each head's v_b on its context.
void MlaLayer::Call::attend_absorbed(float* values) {
  const Matrix& v_b = layer.weights_.v_b;
  const int64_t rank = layer.kv_rank_;
  int32_t* head_rows = scratch.take<int32_t>(heads * n);  // rows of head h in [n, heads, ...]
  for (int64_t i = 0; i < heads * n; ++i) {
    head_rows[i] = static_cast<int32_t>(i % n * heads + i / n);
  }
  float* absorbed = scratch.take<float>(n * heads * row);  // [n, heads, kv_rank + rope]
  absorb_queries(head_rows, absorbed);

  const AttentionShape shape{1, heads, row, rank};
  float* context = scratch.take<float>(n * heads * rank);
  attend(shape, CachedKeys(shape, cache, 0), past, n, absorbed, context, scratch);

  if (recorder) record_heads("context", context, rank, rank);
  const Activations contexts =
      activations(scratch.activations(1), context, n * heads, rank, rank, needs_int8(v_b));
  Product* products = scratch.take<Product>(heads);
  for (int64_t h = 0; h < heads; ++h) {
    products[h] = {
        &v_b, h, &contexts, head_rows + h * n, n, values + h * layer.value_, heads * layer.value_};
  }
  run_products("attention: v_b", scratch, {products, static_cast<size_t>(heads)});
}

// The position-free part of each query times its head's k_b: now it meets the latent directly.
void MlaLayer::Call::absorb_queries(const int32_t* head_rows, float* absorbed) {
  const Matrix& k_b = layer.weights_.k_b;
  const Activations queries =
      activations(scratch.activations(1), q, n * heads, layer.nope_, head, needs_int8(k_b));
  Product* products = scratch.take<Product>(heads);
  for (int64_t h = 0; h < heads; ++h) {
    products[h] = {&k_b, h, &queries, head_rows + h * n, n, absorbed + h * row, heads * row};
  }
  run_products("attention: k_b", scratch, {products, static_cast<size_t>(heads)});
  for (int64_t i = 0; i < n * heads; ++i) {
    const float* rotated = q + i * head + layer.nope_;
    std::copy_n(rotated, layer.rope_width_, absorbed + i * row + layer.kv_rank_);
  }
}

}  // namespace localds
