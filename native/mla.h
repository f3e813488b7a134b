// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), usually in its absorbed
// form: queries are taken into the space of the latent. For many tokens at once, keys and values
// are expanded instead, a block at a time.
#pragma once

#include <cstdint>
#include <optional>

#include "attention.h"
#include "cache.h"
#include "matrix.h"
#include "phases.h"
#include "recorder.h"
#include "rope.h"

namespace localds {

struct MlaWeights {
  Norm norm;                   // [hidden]
  std::optional<Matrix> q_a;   // [q_rank, hidden]; absent without a query rank
  std::optional<Norm> q_norm;  // [q_rank]
  Matrix q;                    // [heads * (nope + rope), q_rank or hidden]
  Matrix kv_a;                 // [kv_rank + rope, hidden]
  Norm kv_norm;                // [kv_rank]
  Matrix k_b;                  // heads of [kv_rank, nope]
  Matrix v_b;                  // heads of [value, kv_rank]
  Matrix output;               // [hidden, heads * value]
};

class MlaLayer {
 public:
  // Geometry comes from the weights; throws std::invalid_argument where they do not fit together.
  MlaLayer(MlaWeights weights, Rope rope, float softmax_scale);

  // x [n, hidden] += attention(norm(x)); writes the rows [past, past + n) of the cache. Records
  // hidden (q_a or q, kv_a), low_query (q with a rank), latent (kv_b of legacy files), values
  // (output), and for each head query (k_b) and context (v_b): these two exist only in the absorbed
  // form, which is always taken then.
  void forward(float* x, int64_t n, const CacheRows& cache, int64_t past, Recorder* recorder) const;

  int64_t hidden() const { return weights_.norm.width(); }

 private:
  struct Call;

  MlaWeights weights_;
  Rope rope_;
  float softmax_scale_;
  int64_t heads_, nope_, rope_width_, value_, kv_rank_;
};

}  // namespace localds
