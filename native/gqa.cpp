#include "gqa.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels.h"
#include "scratch.h"

namespace localds {

GqaLayer::GqaLayer(GqaWeights weights, Rope rope, int64_t heads, int64_t kv_heads,
                   float softmax_scale)
    : weights_(std::move(weights)),
      rope_(std::move(rope)),
      softmax_scale_(softmax_scale),
      heads_(heads),
      kv_heads_(kv_heads) {
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) {
    throw std::invalid_argument("gqa: heads must be a multiple of kv_heads");
  }
  head_ = weights_.q.rows / heads;
  if (rope_.width() > head_) throw std::invalid_argument("gqa: the rope is wider than a head");
  expect_shape("gqa q", weights_.q, heads * head_, hidden());
  expect_shape("gqa k", weights_.k, kv_heads * head_, hidden());
  expect_shape("gqa v", weights_.v, kv_heads * head_, hidden());
  expect_shape("gqa output", weights_.output, hidden(), heads * head_);
}

void GqaLayer::forward(float* x, int64_t n, const CacheRows& cache, int64_t past,
                       Recorder* recorder) const {
  const int64_t kv_width = kv_heads_ * head_;
  const int64_t q_width = heads_ * head_;
  check_cache(cache, 2 * kv_width, head_, past, n);
  if (n == 0) return;
  Scratch scratch;
  const GqaWeights& w = weights_;
  float* hidden_rows = scratch.take<float>(n * hidden());
  float* q = scratch.take<float>(n * q_width);
  float* kv = scratch.take<float>(n * 2 * kv_width);
  float* grouped = scratch.take<float>(n * q_width);

  const bool int8 = needs_int8(w.q) || needs_int8(w.k) || needs_int8(w.v);
  const Activations in = normalized(scratch.activations(0), w.norm, x, n, hidden_rows, int8);
  if (recorder) recorder->add("hidden", in);
  const Product products[] = {{&w.q, 0, &in, nullptr, n, q, q_width},
                              {&w.k, 0, &in, nullptr, n, kv, 2 * kv_width},
                              {&w.v, 0, &in, nullptr, n, kv + kv_width, 2 * kv_width}};
  run_products("attention: q, k, v", scratch, products);
  position_rows(q, kv, n, cache, past, grouped, scratch);

  const AttentionShape shape{kv_heads_, heads_ / kv_heads_, head_, head_};
  attend(shape, CachedKeys(shape, cache, kv_width), past, n, grouped, q, scratch);
  const Activations values =
      activations(scratch.activations(0), q, n, q_width, q_width, needs_int8(w.output));
  if (recorder) recorder->add("values", values);
  add_product("attention: output", scratch, w.output, values, hidden_rows, x);
}

// Rotates queries and keys, scales the queries and orders them by group, writes the cached rows.
void GqaLayer::position_rows(float* q, float* kv, int64_t n, const CacheRows& cache, int64_t past,
                             float* grouped, Scratch& scratch) const {
  const Timed timed("attention: rope, cache rows");
  const int64_t queries = heads_ / kv_heads_;
  const int64_t row = 2 * kv_heads_ * head_;
  float* tables = scratch.take<float>(n * rope_.width());
  parallel_rows(n, 2 * heads_ * head_, [&](int64_t t0, int64_t t1, int) {
    for (int64_t t = t0; t < t1; ++t) {
      float* angles = tables + t * rope_.width();
      rope_.angles(past + t, angles);
      float* keys = kv + t * row;
      for (int64_t g = 0; g < kv_heads_; ++g) rotate(keys + g * head_, angles, rope_.pairs());
      quantize_row(cache.type, keys, cache.row(past + t), row);

      for (int64_t h = 0; h < heads_; ++h) {
        float* query = q + (t * heads_ + h) * head_;
        kernels().scale(softmax_scale_, head_, query);
        rotate(query, angles, rope_.pairs());
        const int64_t to = (h / queries * n + t) * queries + h % queries;
        std::copy(query, query + head_, grouped + to * head_);
      }
    }
  });
}

}  // namespace localds
