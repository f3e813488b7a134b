// The two ends of a model: token ids to hidden states, hidden states to logits.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "phases.h"
#include "recorder.h"

namespace localds {

// out [n, table.cols]: the rows of `table` that `ids` names. Throws std::invalid_argument for an id
// outside the table, before anything is written.
void embed(const Matrix& table, const int32_t* ids, int64_t n, float* out);

class HeadLayer {
 public:
  HeadLayer(Norm norm, Matrix output);

  // logits [n, vocab] = output . norm(x), x [n, hidden]. Records hidden (output).
  void forward(const float* x, int64_t n, float* logits, Recorder* recorder) const;

  int64_t hidden() const { return norm_.width(); }
  int64_t vocabulary() const { return output_.rows; }

 private:
  Norm norm_;
  Matrix output_;
};

}  // namespace localds
