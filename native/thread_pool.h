// One pool of worker threads for the whole process.
//
// `run(n, task)` calls task(i, thread) for every i in [0, n), on the calling thread (thread 0) and
// the workers; it returns when all are done. Tasks are handed out dynamically, so what a task
// computes must depend on i alone. Workers spin briefly between runs, then sleep. Only one `run` is
// active at a time; a second caller waits. Tasks must not call `run` and must not throw.
#pragma once

#include <cstdint>
#include <functional>

namespace localds {

class ThreadPool {
 public:
  static ThreadPool& instance();

  // Sets the number of threads, the caller included; 1 or more.
  void resize(int threads);
  int size() const;

  void run(int64_t tasks, const std::function<void(int64_t task, int thread)>& task);

 private:
  ThreadPool();
  ~ThreadPool();
  struct State;
  State* state_;
};

// Physical cores that this process may use: affinity and cgroup quota respected, at least 1.
int default_threads();

}  // namespace localds
