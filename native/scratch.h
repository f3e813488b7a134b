// The scratch memory of the process. Fused operations take turns: a `Scratch` waits for the one
// before it, and what it handed out is void when it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "kernels.h"

namespace localds {

class Scratch {
 public:
  Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // `count` values of T, uninitialized, aligned to 64 bytes. Only the first calls of a new size
  // allocate.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

  // What is taken after `mark` is given back by `rewind`.
  struct Mark {
    size_t block, used;
  };
  Mark mark() const;
  void rewind(Mark mark);

  // Three buffers, so that an operation can keep several quantized inputs.
  ActivationBuffer& activations(int index);

  // Threads that a pool run has while this Scratch lives.
  int threads() const { return threads_; }

 private:
  void* take_bytes(size_t bytes);

  std::unique_lock<std::mutex> lock_;
  int threads_;
};

// Resizes the pool between operations, never inside one.
void set_threads(int threads);

}  // namespace localds
