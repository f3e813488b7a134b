// Preloaded into a program, makes its reads fail as FAULT says while the file FAULT_WHEN exists:
// "error" (EIO), "short" (a page or two at a time), "empty" (as at the end of the file), "slow".
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef ssize_t (*pread_function)(int, void*, size_t, off_t);

static ssize_t faulty(const char* name, int fd, void* out, size_t bytes, off_t at) {
  pread_function real = (pread_function)dlsym(RTLD_NEXT, name);
  const char* when = getenv("FAULT_WHEN");
  const char* fault = getenv("FAULT");
  if (!when || !fault || access(when, F_OK) != 0) return real(fd, out, bytes, at);
  if (!strcmp(fault, "error")) {
    errno = EIO;
    return -1;
  }
  if (!strcmp(fault, "empty")) return 0;
  if (!strcmp(fault, "slow")) sleep(2);
  if (!strcmp(fault, "short") && bytes > 8192) bytes = at % 3 ? 8192 : 4096;
  return real(fd, out, bytes, at);
}

ssize_t pread(int fd, void* out, size_t bytes, off_t at) {
  return faulty("pread", fd, out, bytes, at);
}

ssize_t pread64(int fd, void* out, size_t bytes, off_t at) {
  return faulty("pread64", fd, out, bytes, at);
}
