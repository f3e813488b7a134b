// Memory for experts: slots of one size in one mapping, of which only those in use take memory.
#pragma once

#include <cstdint>
#include <vector>

namespace localds {

class Slots {
 public:
  static constexpr int32_t kNone = -1;

  // Addresses for up to `most` slots of `bytes` (a multiple of 4096), memory for `wanted` of them.
  // Throws std::bad_alloc.
  Slots(int64_t most, int64_t bytes, int64_t wanted);
  ~Slots();
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  // A slot that nobody has, kNone where `wanted` are taken.
  int32_t take();
  // Gives a slot back; to the system, too, where more are in use than wanted.
  void give(int32_t slot);
  // Slots given back later, and those that nobody has now, follow the new number.
  void set_wanted(int64_t wanted);

  uint8_t* data(int32_t slot) const { return base_ + slot * bytes_; }
  int64_t wanted() const { return wanted_; }
  int64_t bytes() const { return bytes_; }

 private:
  void forget(int32_t slot);

  int64_t most_;
  int64_t bytes_;
  int64_t wanted_;
  int64_t used_ = 0;             // taken, or free with memory
  std::vector<int32_t> free_;    // with memory
  std::vector<int32_t> unused_;  // without
  uint8_t* base_ = nullptr;
};

}  // namespace localds
