// Keys and values of one head, expanded from cached latents. Expanding a row costs as much as
// some hundred queries on it, so this is for long prompts.
#pragma once

#include <cstdint>

#include "attention.h"
#include "cache.h"
#include "matrix.h"

namespace localds {

class ExpandedLatents : public KeySource {
 public:
  // k_b: heads of [kv_rank, nope], v_b: heads of [value, kv_rank]; a cached row is kv_rank latent
  // values and a rotated key of `rope_width`.
  ExpandedLatents(const Matrix& k_b, const Matrix& v_b, int64_t rope_width, const CacheRows& cache)
      : k_b_(k_b), v_b_(v_b), rope_width_(rope_width), cache_(cache) {}

  int64_t work_size(int64_t rows) const override;
  int64_t query_rows() const override { return 2048; }
  Work work(int64_t rows) const override {
    return {.bytes = rows * cache_.row_bytes, .floats = rows * k_b_.batch * weights_size()};
  }
  void start(int64_t group, float* work) const override;
  KeyValues read(int64_t group, int64_t row0, int64_t row1, float* work) const override;

 private:
  int64_t rank() const { return k_b_.rows; }
  int64_t key_width() const { return k_b_.cols + rope_width_; }
  int64_t weights_size() const { return rank() * (k_b_.cols + v_b_.rows); }

  const Matrix& k_b_;
  const Matrix& v_b_;
  int64_t rope_width_;
  const CacheRows& cache_;
};

}  // namespace localds
