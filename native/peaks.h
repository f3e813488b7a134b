// What the machine can do at best: the limits that speeds are held against.
#pragma once

#include <cstdint>

namespace localds {

struct Peaks {
  double read;    // bytes a second from memory
  double int8;    // int8 multiply-adds a second
  double floats;  // float multiply-adds a second
};

// Measured on all threads of the pool with the chosen kernels' instructions, in about a second;
// reads from `bytes` of memory that are taken for that time. Throws std::bad_alloc.
Peaks measure_peaks(int64_t bytes);

}  // namespace localds
