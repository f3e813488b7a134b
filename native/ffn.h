// The dense SwiGLU feed-forward layer: down(silu(gate(x)) * up(x)).
#pragma once

#include <cstdint>

#include "matrix.h"
#include "phases.h"
#include "recorder.h"

namespace localds {

struct FfnWeights {
  Matrix gate;  // [ff, hidden]
  Matrix up;    // [ff, hidden]
  Matrix down;  // [hidden, ff]
};

// Throws std::invalid_argument where the weights do not fit together.
void check_ffn(const char* role, const FfnWeights& weights, int64_t hidden, int64_t batch = 1);

// One tile of silu(gate(x)) * up(x): rows [row0, row1) of matrix `batch` for the n given tokens,
// to out[i * out_stride + r]. `work` has room for n * (row1 - row0) values.
void gated_tile(const Matrix& gate, const Matrix& up, int64_t batch, int64_t row0, int64_t row1,
                const Activations& x, const int32_t* tokens, int64_t n, float* out,
                int64_t out_stride, float* work);

// out = silu(gate(x)) * up(x) for all rows of x [x.rows, ff], the step `name` of the profile.
void gated_rows(const char* name, const FfnWeights& weights, const Activations& x, float* out,
                Scratch& scratch);

class FfnLayer {
 public:
  FfnLayer(Norm norm, FfnWeights weights);

  // x [n, hidden] += ffn(norm(x)). Records hidden (gate, up) and middle (down).
  void forward(float* x, int64_t n, Recorder* recorder) const;

  int64_t hidden() const { return norm_.width(); }

 private:
  Norm norm_;
  FfnWeights weights_;
};

}  // namespace localds
