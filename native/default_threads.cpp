#include "default_threads.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "thread_pool.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sched.h>
#endif

namespace localds {

#if defined(__APPLE__)

int physical_cores(const std::string&) {
  // The first level is the performance cores; efficiency cores would hold every phase up.
  for (const char* name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {
    int count = 0;
    size_t size = sizeof count;
    if (sysctlbyname(name, &count, &size, nullptr, 0) == 0 && count > 0) return count;
  }
  return 0;
}

int quota_cores(const std::string&) { return 0; }

#elif defined(__linux__)

int physical_cores(const std::string& root) {
  constexpr int kMostCpus = 8192;
  cpu_set_t* allowed = CPU_ALLOC(kMostCpus);
  const size_t size = CPU_ALLOC_SIZE(kMostCpus);
  std::set<std::string> cores;
  if (allowed != nullptr && sched_getaffinity(0, size, allowed) == 0) {
    for (int cpu = 0; cpu < kMostCpus; ++cpu) {
      if (!CPU_ISSET_S(cpu, size, allowed)) continue;
      std::ifstream file(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                         "/topology/thread_siblings_list");
      std::string siblings;
      if (!std::getline(file, siblings)) siblings = std::to_string(cpu);
      cores.insert(siblings);
    }
  }
  CPU_FREE(allowed);
  return static_cast<int>(cores.size());
}

namespace {

double read_number(const std::string& path) {
  double value = -1;
  std::ifstream(path) >> value;
  return value;
}

// Cores' worth of time that the control group in `folder` may use; 0 where there is no limit.
double folder_quota(const std::string& folder, bool version2) {
  double quota = -1;
  double period = -1;
  if (version2) {
    std::ifstream file(folder + "/cpu.max");
    std::string text;
    if (file >> text >> period && text != "max") quota = std::atof(text.c_str());
  } else {
    quota = read_number(folder + "/cpu.cfs_quota_us");
    period = read_number(folder + "/cpu.cfs_period_us");
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The tightest limit on the way from the group at `path` up to the root of the hierarchy.
double tightest_quota(const std::string& mount, std::string path, bool version2) {
  double tightest = 0;
  while (true) {
    const double quota = folder_quota(mount + path, version2);
    if (quota > 0) tightest = tightest > 0 ? std::min(tightest, quota) : quota;
    const size_t slash = path.rfind('/');
    if (path.empty() || slash == std::string::npos) return tightest;
    path.resize(slash);
  }
}

}  // namespace

int quota_cores(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double tightest = 0;
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    std::istringstream fields(line);
    std::string number, controllers, path;
    std::getline(fields, number, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    const bool version2 = controllers.empty();
    if (!version2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    for (const char* mount : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/cpu"}) {
      const double quota = tightest_quota(root + mount, path, version2);
      if (quota > 0) tightest = tightest > 0 ? std::min(tightest, quota) : quota;
    }
  }
  if (tightest == 0) return 0;
  // Part of a core is not worth a thread: the group would be stopped in the middle of a phase. A
  // quota may be more than an int can hold.
  return static_cast<int>(std::clamp(tightest, 1.0, 1e6));
}

#else

int physical_cores(const std::string&) { return 0; }
int quota_cores(const std::string&) { return 0; }

#endif

int default_threads() {
  int threads = physical_cores();
  if (threads == 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  if (const int quota = quota_cores(); quota > 0) threads = std::min(threads, quota);
  return std::max(1, threads);
}

}  // namespace localds
