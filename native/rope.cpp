#include "rope.h"

#include <cmath>

namespace localds {

void Rope::angles(int64_t position, float* table) const {
  for (int64_t i = 0; i < pairs(); ++i) {
    // In double: a float angle is off by 0.01 at position 100,000.
    const double angle = static_cast<double>(position) * inverse_frequencies[i];
    table[2 * i] = static_cast<float>(std::cos(angle) * amplitude);
    table[2 * i + 1] = static_cast<float>(std::sin(angle) * amplitude);
  }
}

void rotate(float* x, const float* table, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float even = x[2 * i];
    const float odd = x[2 * i + 1];
    const float cosine = table[2 * i];
    const float sine = table[2 * i + 1];
    x[2 * i] = even * cosine - odd * sine;
    x[2 * i + 1] = even * sine + odd * cosine;
  }
}

}  // namespace localds
