#include "peaks.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace localds {
namespace {

constexpr int kRepeats = 7;
constexpr int64_t kIterations = 2'000'000;
constexpr int64_t kBlock = int64_t{1} << 19;  // as much as a task of a product reads

// The best time of several, in seconds, of task(i) for all i.
template <class Task>
double best_seconds(int64_t tasks, Task task) {
  double best = 1e9;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    ThreadPool::instance().run(tasks, [&](int64_t i, int) { task(i); });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

double read_speed(float (*read)(const uint8_t*, int64_t), int64_t bytes) {
  const int64_t blocks = std::max<int64_t>(1, bytes / kBlock);
  const auto size = static_cast<size_t>(blocks * kBlock);
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(address, size, MADV_HUGEPAGE);
#endif
  auto* data = static_cast<uint8_t*>(address);
  std::memset(data, 1, size);
  std::vector<float> results(static_cast<size_t>(blocks));
  const double seconds = best_seconds(blocks, [&](int64_t i) {
    results[static_cast<size_t>(i)] = read(data + i * kBlock, kBlock);
  });
  munmap(address, size);
  return static_cast<double>(size) / seconds;
}

double loop_speed(int64_t (*loop)(int64_t)) {
  const int threads = ThreadPool::instance().size();
  int64_t done = 0;
  const double seconds = best_seconds(threads, [&](int64_t i) {
    const int64_t multiply_adds = loop(kIterations);
    if (i == 0) done = multiply_adds;
  });
  return static_cast<double>(done) * threads / seconds;
}

}  // namespace

Peaks measure_peaks(int64_t bytes) {
  const Kernels& table = kernels();  // a wrong choice of them throws here, not in a task
  const Scratch turn;
  return {read_speed(table.read_loop, bytes), loop_speed(table.int8_loop),
          loop_speed(table.float_loop)};
}

}  // namespace localds
