#include "direct_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

namespace localds {
namespace {

int open_file(const std::string& path, int flags) {
  return open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
}

// The system may interrupt a read or end it early; 0 is the end of the file.
ssize_t read_some(int descriptor, uint8_t* out, int64_t bytes, int64_t start) {
  ssize_t got;
  do {
    got = pread(descriptor, out, static_cast<size_t>(bytes), start);
  } while (got < 0 && errno == EINTR);
  return got;
}

bool same_time(const struct stat& a, const struct stat& b) {
#if defined(__APPLE__)
  return a.st_mtimespec.tv_sec == b.st_mtimespec.tv_sec &&
         a.st_mtimespec.tv_nsec == b.st_mtimespec.tv_nsec;
#else
  return a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
#endif
}

}  // namespace

DirectFile::DirectFile(std::string path) : path_(std::move(path)) {
  open_direct();
  if (descriptor_ < 0) descriptor_ = open_file(path_, 0);
  if (descriptor_ < 0 || fstat(descriptor_, &opened_) != 0) {
    const std::string why = std::strerror(errno);
    if (descriptor_ >= 0) close(descriptor_);
    throw ReadError(path_ + ": cannot be opened for reading experts (" + why + ")");
  }
}

DirectFile::~DirectFile() { close(descriptor_); }

// Some file systems refuse to open so, others only to read: a read tells.
void DirectFile::open_direct() {
#if defined(__linux__)
  const int descriptor = open_file(path_, O_DIRECT);
  if (descriptor < 0) return;
  const std::unique_ptr<void, decltype(&std::free)> page(std::aligned_alloc(kAlignment, kAlignment),
                                                         &std::free);
  if (!page) throw std::bad_alloc();
  if (read_some(descriptor, static_cast<uint8_t*>(page.get()), kAlignment, 0) < 0) {
    close(descriptor);
    return;
  }
  descriptor_ = descriptor;
  direct_ = true;
#elif defined(__APPLE__)
  descriptor_ = open_file(path_, 0);
  direct_ = descriptor_ >= 0 && fcntl(descriptor_, F_NOCACHE, 1) == 0;
#endif
}

void DirectFile::read(int64_t start, int64_t bytes, uint8_t* out, const std::string& what) const {
  const int64_t end = std::min(start + bytes, size());
  for (int64_t at = start; at < end;) {
    const ssize_t got = read_some(descriptor_, out + (at - start), start + bytes - at, at);
    if (got < 0) {
      throw ReadError(path_ + ": " + what + ": reading " + std::to_string(bytes) +
                      " bytes at byte " + std::to_string(start) + " failed (" +
                      std::strerror(errno) + "); check the disk");
    }
    // A direct read goes on where it may: at a multiple of the alignment.
    const int64_t step = at + got >= end || !direct_ ? got : got / kAlignment * kAlignment;
    if (step == 0) {
      check_unchanged(what);
      throw ReadError(path_ + ": " + what + ": the file gives nothing at byte " +
                      std::to_string(at) + " of " + std::to_string(size()) + "; check the disk");
    }
    at += step;
  }
#if defined(POSIX_FADV_DONTNEED)
  if (!direct_) posix_fadvise(descriptor_, start, bytes, POSIX_FADV_DONTNEED);
#endif
  check_unchanged(what);
}

void DirectFile::check_unchanged(const std::string& what) const {
  struct stat now{};
  const bool known = fstat(descriptor_, &now) == 0;
  if (known && now.st_size == opened_.st_size && same_time(now, opened_)) return;
  const bool shorter = known && now.st_size < opened_.st_size;
  throw ReadError(path_ + ": " + what + ": the file was " + (shorter ? "cut short" : "changed") +
                  " while it was in use; " + (shorter ? "fetch it again" : "load the model again"));
}

}  // namespace localds
