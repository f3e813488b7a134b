#include "slots.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace localds {

Slots::Slots(int64_t most, int64_t bytes, int64_t wanted)
    : most_(most), bytes_(bytes), wanted_(std::min(wanted, most)) {
  const auto size = static_cast<size_t>(most * bytes);
  int flags = MAP_PRIVATE | MAP_ANON;
#if defined(MAP_NORESERVE)
  flags |= MAP_NORESERVE;
#endif
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(address, size, MADV_HUGEPAGE);  // weights are read faster from large pages
#endif
  base_ = static_cast<uint8_t*>(address);
  for (int64_t i = most; i-- > 0;) unused_.push_back(static_cast<int32_t>(i));
}

Slots::~Slots() { munmap(base_, static_cast<size_t>(most_ * bytes_)); }

int32_t Slots::take() {
  std::vector<int32_t>& from = free_.empty() ? unused_ : free_;
  if (from.empty() || (free_.empty() && used_ >= wanted_)) return kNone;
  if (free_.empty()) ++used_;
  const int32_t slot = from.back();
  from.pop_back();
  return slot;
}

void Slots::give(int32_t slot) {
  if (used_ > wanted_) {
    forget(slot);
  } else {
    free_.push_back(slot);
  }
}

void Slots::set_wanted(int64_t wanted) {
  wanted_ = std::min(wanted, most_);
  while (used_ > wanted_ && !free_.empty()) {
    forget(free_.back());
    free_.pop_back();
  }
}

void Slots::forget(int32_t slot) {
#if defined(__linux__)
  madvise(data(slot), static_cast<size_t>(bytes_), MADV_DONTNEED);
#else
  madvise(data(slot), static_cast<size_t>(bytes_), MADV_FREE);
#endif
  --used_;
  unused_.push_back(slot);
}

}  // namespace localds
