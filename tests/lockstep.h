// What a kernel's source may use of the emulator in lockstep.cpp. It needs no header, so that a
// kernel compiles in a moment and may define names such as uint8_t itself.
#pragma once

namespace lockstep {

struct Index {
  unsigned x, y, z;
};
// Of the lane that runs: its thread in the block, its block, and their numbers.
extern Index thread_index, block_index, block_size, grid_size;

// Of the launch.
extern void** buffers;
extern const double* scalars;
template <typename T>
T* buffer(int i) {
  return static_cast<T*>(buffers[i]);
}
template <typename T>
T scalar(int i) {
  return static_cast<T>(scalars[i]);
}

// Lane of the warp (SIMD group) that runs, and the lanes of a warp.
unsigned lane();
unsigned warp_lanes();

// Wait until all lanes of the warp, or all threads of the block, are there.
void warp_barrier();
void block_barrier();

// Where the running lane puts a value of up to 16 bytes, and after a barrier the others find it.
void* own_slot();
const void* slot_of(unsigned lane);

// The `value` that lane `from` of the warp brings; all its lanes must take part.
template <typename T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 16);
  __builtin_memcpy(own_slot(), &value, sizeof(T));
  warp_barrier();
  T found;
  __builtin_memcpy(&found, slot_of(from), sizeof(T));
  return found;
}

}  // namespace lockstep
