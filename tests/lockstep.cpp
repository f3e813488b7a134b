// Runs the blocks of a grid one after the other. Each thread of a block is a fiber that runs until
// a barrier; a warp goes on when all its lanes are there. Buffers end where memory ends.
#ifdef __APPLE__
#define _XOPEN_SOURCE 700  // which its ucontext.h asks for
#define _DARWIN_C_SOURCE
#endif

#include "lockstep.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <vector>

extern "C" void lockstep_kernel();  // one lane's call, in the kernel's file

namespace lockstep {

Index thread_index, block_index, block_size, grid_size;
void** buffers;
const double* scalars;

namespace {

constexpr size_t kStack = 1 << 17, kAlign = 16, kFence = 1 << 26;
constexpr unsigned char kSlack = 0xA5;

enum class State { kAtWarp, kAtBlock, kDone };

struct Lane {
  ucontext_t beginning;
  jmp_buf waiting;  // once begun: a jump takes no system call
  bool begun;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  unsigned number;
  bool second;  // which slot the last value was put in: a lane is at most one exchange ahead
  alignas(16) char slots[2][16];
};

std::vector<Lane> lanes;
jmp_buf scheduler;
Lane* running;
unsigned warp_size;
const char* error;

Index unflatten(unsigned i, Index size) {
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

void lane_main() {
  lockstep_kernel();
  running->state = State::kDone;
  _longjmp(scheduler, 1);
}

void start(Lane& lane) {
  getcontext(&lane.beginning);
  lane.beginning.uc_stack.ss_sp = lane.stack.get();
  lane.beginning.uc_stack.ss_size = kStack;
  lane.beginning.uc_link = nullptr;
  makecontext(&lane.beginning, lane_main, 0);
  lane.begun = false;
}

void resume(Lane& lane) {
  running = &lane;
  thread_index = unflatten(lane.number, block_size);
  if (_setjmp(scheduler)) return;
  if (lane.begun) _longjmp(lane.waiting, 1);
  lane.begun = true;
  setcontext(&lane.beginning);
}

void wait(State state) {
  running->state = state;
  if (!_setjmp(running->waiting)) _longjmp(scheduler, 1);
}

// Runs a warp until its lanes are done or wait for their block.
void run_warp(Lane* first, Lane* end) {
  do {
    for (Lane* lane = first; lane < end && !error; ++lane) resume(*lane);
    for (Lane* lane = first; lane < end && !error; ++lane) {
      if (lane->state != first->state) error = "the lanes of a warp do not meet at a barrier";
    }
  } while (first->state == State::kAtWarp && !error);
}

void run_block() {
  for (Lane& lane : lanes) start(lane);
  Lane* const end = lanes.data() + lanes.size();
  for (bool live = true; live && !error;) {
    for (Lane* warp = lanes.data(); warp < end && !error; warp += warp_size) {
      run_warp(warp, warp + warp_size);
    }
    live = lanes[0].state != State::kDone;
    for (Lane& lane : lanes) {
      if (!error && (lane.state != State::kDone) != live) {
        error = "the warps of a block do not meet at a barrier";
      }
    }
  }
}

void run_grid() {
  for (unsigned i = 0; i < grid_size.x * grid_size.y * grid_size.z && !error; ++i) {
    block_index = unflatten(i, grid_size);
    run_block();
  }
}

void fault(int signal) {
  error = signal == SIGSEGV || signal == SIGBUS ? "the kernel leaves its buffers"
                                                : "the kernel traps: an address is misaligned";
  _longjmp(scheduler, 1);
}

// Turns a lane's faults into `error` as long as it lives.
class Guard {
 public:
  Guard() {
    struct sigaction action{};
    action.sa_handler = fault;
    action.sa_flags = SA_NODEFER;  // it does not return
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Guard() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[4];
};

// A copy of a buffer that ends, but for alignment, where a wide fence begins.
class Fenced {
 public:
  Fenced(const void* data, size_t bytes) : bytes_(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t aligned = (bytes + kAlign - 1) / kAlign * kAlign;
    const size_t inside = (aligned + page - 1) / page * page;
    mapped_ = inside + 2 * kFence;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0));
    mprotect(base_ + kFence, inside, PROT_READ | PROT_WRITE);
    at_ = base_ + kFence + inside - aligned;
    memset(at_, kSlack, aligned);
    memcpy(at_, data, bytes);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(base_, mapped_); }

  char* at() { return at_; }
  bool spilled() const {
    for (size_t i = bytes_; i % kAlign; ++i) {
      if (static_cast<unsigned char>(at_[i]) != kSlack) return true;
    }
    return false;
  }

 private:
  char *base_, *at_;
  size_t bytes_, mapped_;
};

}  // namespace

unsigned lane() { return running->number % warp_size; }
unsigned warp_lanes() { return warp_size; }
void warp_barrier() { wait(State::kAtWarp); }
void block_barrier() { wait(State::kAtBlock); }
void* own_slot() {
  running->second = !running->second;
  return running->slots[running->second];
}
const void* slot_of(unsigned lane) {
  const unsigned first = running->number / warp_size * warp_size;
  return lanes[first + lane % warp_size].slots[running->second];
}

}  // namespace lockstep

// Runs a grid; writes the buffers back that `writable` marks. Returns what went wrong, or null.
extern "C" const char* lockstep_run(void** data, const size_t* bytes, const bool* writable,
                                    int count, const double* scalars, const unsigned* blocks,
                                    const unsigned* threads, unsigned warp) {
  using namespace lockstep;
  std::vector<std::unique_ptr<Fenced>> fenced;
  std::vector<void*> pointers;
  for (int i = 0; i < count; ++i) {
    fenced.push_back(std::make_unique<Fenced>(data[i], bytes[i]));
    pointers.push_back(fenced.back()->at());
  }
  buffers = pointers.data();
  lockstep::scalars = scalars;
  grid_size = {blocks[0], blocks[1], blocks[2]};
  block_size = {threads[0], threads[1], threads[2]};
  warp_size = warp;
  error = nullptr;
  lanes = std::vector<Lane>(threads[0] * threads[1] * threads[2]);
  for (unsigned i = 0; i < lanes.size(); ++i) lanes[i].number = i;
  {
    const Guard guard;
    run_grid();
  }
  for (int i = 0; i < count; ++i) {
    if (!error && fenced[i]->spilled()) error = "the kernel writes past the end of a buffer";
    if (writable[i]) memcpy(data[i], fenced[i]->at(), bytes[i]);
  }
  return error;
}
