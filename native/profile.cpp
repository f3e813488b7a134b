#include "profile.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "scratch.h"

namespace localds {
namespace {

std::vector<ProfiledStep>& steps() {
  static auto* instance = new std::vector<ProfiledStep>();  // outlives every thread, like the pool
  return *instance;
}

}  // namespace

Work& Work::operator+=(const Work& other) {
  bytes += other.bytes;
  int8 += other.int8;
  floats += other.floats;
  return *this;
}

Work product_work(const Matrix& w, int64_t n, int64_t batches) {
  const int64_t multiply_adds = n * w.rows * w.cols;
  Work work{.bytes = batches * w.rows * w.row_bytes};
  (type_info(w.type).is_float ? work.floats : work.int8) = multiply_adds;
  return work;
}

Timed::~Timed() {
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start_;
  auto& all = steps();
  auto step = std::find_if(all.begin(), all.end(), [this](const ProfiledStep& s) {
    return s.name == name_ || std::strcmp(s.name, name_) == 0;
  });
  if (step == all.end()) step = all.insert(all.end(), {name_, 0, 0, {}});
  ++step->calls;
  step->seconds += taken.count();
  step->work += work_;
}

std::vector<ProfiledStep> take_profile() {
  const Scratch turn;
  return std::exchange(steps(), {});
}

}  // namespace localds
