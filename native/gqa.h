// Grouped-query attention with interleaved rotary embedding (Mixtral, arXiv:2401.04088).
#pragma once

#include <cstdint>

#include "attention.h"
#include "cache.h"
#include "matrix.h"
#include "phases.h"
#include "recorder.h"
#include "rope.h"

namespace localds {

struct GqaWeights {
  Norm norm;      // [hidden]
  Matrix q;       // [heads * head, hidden]
  Matrix k;       // [kv_heads * head, hidden]
  Matrix v;       // [kv_heads * head, hidden]
  Matrix output;  // [hidden, heads * head]
};

class GqaLayer {
 public:
  // Throws std::invalid_argument where the weights do not fit together.
  GqaLayer(GqaWeights weights, Rope rope, int64_t heads, int64_t kv_heads, float softmax_scale);

  // x [n, hidden] += attention(norm(x)); writes the rows [past, past + n) of the cache. Records
  // hidden (q, k, v) and values (output).
  void forward(float* x, int64_t n, const CacheRows& cache, int64_t past, Recorder* recorder) const;

  int64_t hidden() const { return weights_.norm.width(); }

 private:
  void position_rows(float* q, float* kv, int64_t n, const CacheRows& cache, int64_t past,
                     float* grouped, Scratch& scratch) const;

  GqaWeights weights_;
  Rope rope_;
  float softmax_scale_;
  int64_t heads_, kv_heads_, head_;
};

}  // namespace localds
