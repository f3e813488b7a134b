// What the fused operations did since the last `take_profile`, step by step: seconds, calls, bytes
// and multiply-adds. Always on: a step costs two looks at the clock.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace localds {

// What a step cannot avoid: bytes of weights or of the cache read once, multiply-adds.
struct Work {
  int64_t bytes = 0;
  int64_t int8 = 0;
  int64_t floats = 0;

  Work& operator+=(const Work& other);
};

// `batches` matrices of w, each multiplied with some of n rows of activations in all.
Work product_work(const Matrix& w, int64_t n, int64_t batches = 1);

struct ProfiledStep {
  const char* name;
  int64_t calls;
  double seconds;
  Work work;
};

// Times a step from construction to the end of the scope. Only while a Scratch lives: its lock
// guards the profile. `name` is a literal.
class Timed {
 public:
  explicit Timed(const char* name, Work work = {})
      : name_(name), work_(work), start_(std::chrono::steady_clock::now()) {}
  ~Timed();
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  const char* name_;
  Work work_;
  std::chrono::steady_clock::time_point start_;
};

// The steps in the order of their first calls; the next profile begins empty.
std::vector<ProfiledStep> take_profile();

}  // namespace localds
