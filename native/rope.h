// Rotary position embedding of interleaved pairs (2i, 2i + 1): formats and frequencies come from
// the model (YaRN is in the frequencies and the amplitude).
#pragma once

#include <cstdint>
#include <vector>

namespace localds {

struct Rope {
  std::vector<float> inverse_frequencies;  // radians per position, one per pair
  float amplitude;                         // multiplies cosine and sine

  int64_t pairs() const { return static_cast<int64_t>(inverse_frequencies.size()); }
  int64_t width() const { return 2 * pairs(); }

  // table [width()]: cosine and sine of each pair at `position`, interleaved.
  void angles(int64_t position, float* table) const;
};

// Rotates the first 2 * pairs values of x in place.
void rotate(float* x, const float* table, int64_t pairs);

}  // namespace localds
