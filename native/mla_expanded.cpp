#include "mla_expanded.h"

#include <algorithm>

#include "kernels.h"

namespace localds {

// The work space holds the head's two matrices as floats, then latents, keys and values of a block.
int64_t ExpandedLatents::work_size(int64_t rows) const {
  return weights_size() + rows * (rank() + rope_width_ + key_width() + v_b_.rows);
}

void ExpandedLatents::start(int64_t head, float* work) const {
  for (int64_t r = 0; r < rank(); ++r, work += k_b_.cols) {
    dequantize_row(k_b_.type, k_b_.row(head, r), work, k_b_.cols);
  }
  for (int64_t r = 0; r < v_b_.rows; ++r, work += rank()) {
    dequantize_row(v_b_.type, v_b_.row(head, r), work, rank());
  }
}

KeyValues ExpandedLatents::read(int64_t, int64_t row0, int64_t row1, float* work) const {
  const int64_t n = row1 - row0;
  const int64_t nope = k_b_.cols;
  const int64_t width = rank() + rope_width_;
  const float* key_weights = work;
  const float* value_weights = work + rank() * nope;
  float* buffer = work + weights_size();
  float* keys = buffer + n * width;
  float* values = keys + n * key_width();

  const FloatTile latents = read_cache(cache_, row0, row1, 0, width, buffer);
  for (int64_t i = 0; i < n; ++i) {
    float* key = keys + i * key_width();
    std::fill_n(key, nope, 0.0f);
    std::copy_n(latents.data + i * latents.stride + rank(), rope_width_, key + nope);
  }
  const bool rounded = cache_.rounded();
  const auto gemm_nn = rounded ? kernels().near_nn : kernels().gemm_nn;
  const auto gemm_nt = rounded ? kernels().near_nt : kernels().gemm_nt;
  gemm_nn(n, nope, rank(), latents.data, latents.stride, key_weights, nope, keys, key_width());
  gemm_nt(n, v_b_.rows, rank(), latents.data, latents.stride, value_weights, rank(), values,
          v_b_.rows);
  return {{keys, key_width()}, {values, v_b_.rows}, rounded};
}

}  // namespace localds
