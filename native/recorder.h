// What products were fed: per column, the sum over tokens of the squared input. These sums say
// which columns of a weight matter when it is quantized.
//
// A layer's forward takes a Recorder, null unless somebody asked, and adds each input to it under
// a name once it lies in memory. Threading: add and read from one thread at a time; the work is
// shared out inside. Sums do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"

namespace localds {

// n rows of input that matrix `matrix` was multiplied with: row(i) = x + (rows ? rows[i] : i) *
// stride.
struct RecordedRows {
  int64_t matrix;
  const float* x;
  int64_t stride;
  const int32_t* rows;
  int64_t n;
};

class Recorder {
 public:
  struct Sums {
    int64_t columns;
    std::vector<double> squares;  // [matrices, columns]
    std::vector<int64_t> counts;  // rows added, per matrix
  };

  // Adds to the sums of the input `name`, which has one row of `columns` sums per matrix. A matrix
  // may appear once in `parts`. Throws std::invalid_argument for a name of another shape.
  void add(const char* name, int64_t matrices, int64_t columns,
           std::span<const RecordedRows> parts);

  // The same for the input of a single matrix.
  void add(const char* name, const Activations& x);

  // Null for a name that nothing was added to.
  const Sums* find(const std::string& name) const;

 private:
  std::map<std::string, Sums, std::less<>> sums_;
};

}  // namespace localds
