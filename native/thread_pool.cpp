#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace localds {
namespace {

// Longer than the gap between two operations of a decoded token, shorter than anybody notices.
constexpr std::chrono::microseconds kSpin{100};

constexpr size_t kCacheLine = 64;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

// Spins until `ready()` or the time is over; says whether it was ready.
template <class Ready>
bool spin(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

struct ThreadPool::State {
  explicit State(int n) : threads(n), ranges(static_cast<size_t>(n)) {}

  std::mutex run_mutex;  // held by the one active `run`, or by `resize`
  std::atomic<int> threads;
  std::vector<std::thread> workers;  // started by the first run that needs them

  // The run in progress. A thread's unclaimed tasks are a range of its own, begin in the high half
  // and end in the low one. It takes them from the front: its neighbours are in memory side by
  // side, and what was fetched ahead is used. Whoever has none left takes them from the backs of
  // others.
  struct alignas(kCacheLine) Range {
    std::atomic<uint64_t> tasks{0};
  };
  std::vector<Range> ranges;  // one a thread
  std::atomic<int64_t> done{0};
  const std::function<void(int64_t, int)>* task = nullptr;
  int64_t tasks = 0;

  std::atomic<uint32_t> epoch{0};  // changes when there is something to wake up for
  std::atomic<bool> stop{false};

  bool claim(int thread, int64_t* index);
  void work(int thread);
  void worker(int thread);
  void start_workers();
  void stop_workers();
};

// A compare-and-swap may succeed on the range of a later run than it was read from: then the task
// is one of that run, whose `task` was stored before its ranges.
bool ThreadPool::State::claim(int thread, int64_t* index) {
  const int count = static_cast<int>(ranges.size());
  for (int i = 0; i < count; ++i) {
    std::atomic<uint64_t>& range = ranges[static_cast<size_t>((thread + i) % count)].tasks;
    uint64_t seen = range.load(std::memory_order_acquire);
    while (true) {
      const uint64_t begin = seen >> 32, end = static_cast<uint32_t>(seen);
      if (begin >= end) break;
      const uint64_t rest = i == 0 ? (begin + 1) << 32 | end : begin << 32 | (end - 1);
      if (range.compare_exchange_weak(seen, rest, std::memory_order_acq_rel)) {
        *index = static_cast<int64_t>(i == 0 ? begin : end - 1);
        return true;
      }
    }
  }
  return false;
}

void ThreadPool::State::work(int thread) {
  int64_t index;
  while (claim(thread, &index)) {
    const int64_t all = tasks;  // of this run: the next may begin after the last addition
    (*task)(index, thread);
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == all) done.notify_all();
  }
}

void ThreadPool::State::worker(int thread) {
  while (!stop.load(std::memory_order_acquire)) {
    // Read before the work and changed after the ranges are set: no wake-up is lost.
    const uint32_t seen = epoch.load(std::memory_order_acquire);
    work(thread);
    if (!spin([&] { return epoch.load(std::memory_order_relaxed) != seen; })) epoch.wait(seen);
  }
}

void ThreadPool::State::start_workers() {
  while (static_cast<int>(workers.size()) + 1 < threads.load()) {
    const int thread = static_cast<int>(workers.size()) + 1;
    workers.emplace_back([this, thread] { worker(thread); });
  }
}

void ThreadPool::State::stop_workers() {
  stop.store(true);
  epoch.fetch_add(1);
  epoch.notify_all();
  for (std::thread& worker : workers) worker.join();
  workers.clear();
  stop.store(false);
}

ThreadPool::ThreadPool() : state_(new State(default_threads())) {
  // A child process has no workers, and perhaps a locked mutex: it starts over. The old state
  // cannot be freed, since its threads can be neither joined nor detached.
  pthread_atfork(nullptr, nullptr, [] {
    ThreadPool& pool = instance();
    pool.state_ = new State(pool.state_->threads.load());
  });
}

ThreadPool& ThreadPool::instance() {
  // Never destroyed: workers sleep in it until the process ends.
  static ThreadPool* pool = new ThreadPool();
  return *pool;
}

int ThreadPool::size() const { return state_->threads.load(); }

void ThreadPool::resize(int threads) {
  constexpr int kMost = 1024;
  if (threads < 1 || threads > kMost) {
    throw std::invalid_argument("threads: " + std::to_string(threads) + " is not between 1 and " +
                                std::to_string(kMost));
  }
  std::lock_guard lock(state_->run_mutex);
  if (threads == state_->threads.load()) return;
  state_->stop_workers();
  state_->threads.store(threads);
  state_->ranges = std::vector<State::Range>(static_cast<size_t>(threads));
}

void ThreadPool::run(int64_t tasks, const std::function<void(int64_t, int)>& task) {
  State& s = *state_;
  std::lock_guard lock(s.run_mutex);
  if (tasks <= 1 || s.threads.load() == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i, 0);
    return;
  }
  if (tasks > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("ThreadPool::run: too many tasks: " + std::to_string(tasks));
  }
  s.start_workers();
  s.task = &task;
  s.tasks = tasks;
  s.done.store(0, std::memory_order_relaxed);
  const auto threads = static_cast<int64_t>(s.ranges.size());
  for (int64_t i = 0; i < threads; ++i) {
    const auto begin = static_cast<uint64_t>(tasks * i / threads);
    const auto end = static_cast<uint64_t>(tasks * (i + 1) / threads);
    s.ranges[static_cast<size_t>(i)].tasks.store(begin << 32 | end, std::memory_order_release);
  }
  s.epoch.fetch_add(1);
  s.epoch.notify_all();

  s.work(0);
  const auto finished = [&s, tasks] { return s.done.load(std::memory_order_acquire) == tasks; };
  // A worker that lost its core in the middle of a task gets this one only if it falls idle.
  if (spin(finished)) return;
  for (uint32_t seen; (seen = s.done.load(std::memory_order_acquire)) != tasks;) s.done.wait(seen);
}

}  // namespace localds
