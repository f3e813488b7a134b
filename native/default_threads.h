// How many threads are worth having: one per physical core that this process may use (see
// default_threads in thread_pool.h). `root` comes before the paths of Linux's files, for tests.
#pragma once

#include <string>

namespace localds {

// Cores, not hardware threads, that the process's affinity allows; 0 where the system does not say.
int physical_cores(const std::string& root = "");

// Whole cores' worth of time that the process's control groups allow, at least 1; 0 if no limit.
int quota_cores(const std::string& root = "");

}  // namespace localds
