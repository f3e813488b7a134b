// A file read around the system's cache: what is read takes no memory but the reader's own.
//
// Threading: reads may run on any threads at once.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace localds {

// A file could not be read as it was when it was opened.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class DirectFile {
 public:
  // Positions, sizes and memory of direct reads are multiples of this.
  static constexpr int64_t kAlignment = 4096;

  // Throws ReadError where the file cannot be opened.
  explicit DirectFile(std::string path);
  ~DirectFile();
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  // Reads `bytes` from `start` on to `out`, all of them aligned; beyond the end of the file there
  // is nothing. Throws ReadError, its text after `what`, if the disk fails, or if the file is no
  // longer as long or as old as when it was opened.
  void read(int64_t start, int64_t bytes, uint8_t* out, const std::string& what) const;

  const std::string& path() const { return path_; }
  int64_t size() const { return opened_.st_size; }

 private:
  void open_direct();
  void check_unchanged(const std::string& what) const;

  std::string path_;
  int descriptor_ = -1;
  bool direct_ = false;  // else what is read is dropped from the system's cache at once
  struct stat opened_{};
};

}  // namespace localds
